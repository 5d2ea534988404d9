"""Makes the manual pages from ``man/*.rst`` when cloudfs is built, and lays examples beside them.
All else stands in setup.cfg."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.build import build

SOURCES = Path("man")
PAGES = Path("build/man")
EXAMPLES_FROM = "share/external"
EXAMPLES = "share/cloudfs/external"


def pages() -> list[Path]:
    """The pages to be made: ``cloudfs.1`` from ``cloudfs.1.rst``, and so on."""
    return sorted(PAGES / source.stem for source in SOURCES.glob("*.rst"))


class BuildPages(Command):
    """A step of every build, also of an editable one. A page with a warning ends it."""

    description = "make the manual pages"
    user_options: ClassVar[list[tuple[str, str, str]]] = []
    editable_mode = False
    build_lib: str | None = None

    def initialize_options(self) -> None:
        """There are no options."""

    def finalize_options(self) -> None:
        """There are no options."""

    def run(self) -> None:
        """Make them."""
        from docutils.core import publish_file
        from docutils.writers.manpage import Writer

        PAGES.mkdir(parents=True, exist_ok=True)
        for page in pages():
            publish_file(
                source_path=str(SOURCES / f"{page.name}.rst"),
                destination_path=str(page),
                writer=Writer(),
                settings_overrides={
                    "_disable_config": True,
                    "halt_level": 2,
                    "input_encoding": "utf-8",
                    "output_encoding": "utf-8",
                },
            )

    def get_source_files(self) -> list[str]:
        """What the pages are made from."""
        return [str(source) for source in SOURCES.iterdir()]

    def get_outputs(self) -> list[str]:
        """Nothing in the package itself."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing in the package itself."""
        return {}


class Build(build):
    """The build, with the pages made first."""

    sub_commands: ClassVar = [("build_pages", None), *build.sub_commands]


def data_files() -> list[tuple[str, list[str]]]:
    """Where **man**(1) looks for pages, beside the ``bin`` that the program goes to, and where
    those pages say that examples are."""
    sections: dict[str, list[str]] = {}
    for page in pages():
        sections.setdefault(f"share/man/man{page.suffix[1:]}", []).append(str(page))
    sections[EXAMPLES] = [str(path) for path in sorted(Path(EXAMPLES_FROM).iterdir())]
    return sorted(sections.items())


setup(data_files=data_files(), cmdclass={"build": Build, "build_pages": BuildPages})
