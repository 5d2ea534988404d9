"""The program. Imports nothing until it runs: processes that import the main module pay nothing."""


def main() -> None:
    """Run the command line and exit with its code."""
    import sys

    from cloudfs.cli.main import run

    sys.exit(run())


if __name__ == "__main__":
    main()
