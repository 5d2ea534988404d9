"""The program. Imports nothing until it runs: processes that import the main module pay nothing."""


def main() -> None:
    """Run the command line and exit with its code."""
    import gc
    import sys

    # By default, circles that are no longer used are looked for fifty times while a sync imports.
    gc.set_threshold(100_000, 20, 100)

    from cloudfs.cli.main import run

    sys.exit(run())


if __name__ == "__main__":
    main()
