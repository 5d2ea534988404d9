"""What of a tree a policy leaves out: by patterns, by a file in a directory, by the file system."""

from __future__ import annotations

import os

import msgspec

CACHE_TAG_NAME = b"CACHEDIR.TAG"
CACHE_TAG = b"Signature: 8a477f597d28d172789f06886806bc55"


class Filters(msgspec.Struct, frozen=True):
    """What a policy says of that."""

    excludes: tuple[str, ...] = ()
    exclude_caches: bool = False
    exclude_if_present: tuple[str, ...] = ()
    one_file_system: bool = False

    @property
    def by_name(self) -> bool:
        """Whether any entry has to be looked at by name."""
        return bool(self.excludes) or self.by_tag

    @property
    def by_tag(self) -> bool:
        """Whether a file in a directory may leave out what else is in it."""
        return bool(self.exclude_if_present or self.exclude_caches)

    @property
    def by_path(self) -> bool:
        """Whether what is left out in a directory depends on where that is: by a pattern with a
        slash before its end, or by one that takes back what another may have said of a name above.
        """
        patterns = [pattern.strip().removesuffix("/") for pattern in self.excludes]
        return any("/" in pattern or pattern.startswith("!") for pattern in patterns)

    def leaves_out(self, path: bytes) -> bool:
        """Whether a directory of another file system, at a path below its source, is left out."""
        if self.one_file_system:
            return True
        return bool(self.excludes) and Matcher(self.excludes).excludes(path, is_dir=True)


class Matcher:
    """gitignore-style patterns over paths below the source."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        import pathspec

        self._spec = pathspec.GitIgnoreSpec.from_lines(patterns)

    def excludes(self, path: bytes, is_dir: bool) -> bool:
        """Whether the patterns leave this path out."""
        text = os.fsdecode(path).replace("\n", "\0")  # what ends no line for a regular expression
        return self._spec.match_file(text + ("/" if is_dir else ""))


def is_cache(directory_fd: int) -> bool:
    """Whether an open directory is tagged as one that holds what can be made again
    (https://bford.info/cachedir/)."""
    try:
        fd = os.open(
            CACHE_TAG_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory_fd
        )
    except OSError:
        return False
    try:
        return os.read(fd, len(CACHE_TAG)) == CACHE_TAG
    except OSError:
        return False
    finally:
        os.close(fd)
