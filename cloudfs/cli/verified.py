"""What is said of a sample of what a change source calls unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cloudfs.cli.output import Output, quote_path
from cloudfs.core import human

if TYPE_CHECKING:
    from cloudfs.backup.job import Verified

NAMED = 5
_DATA = "data"


def sentence(name: str, source: str, found: Verified) -> str:
    """What differs, what is done about it, and what is to be done."""
    number = len(found.differences)
    first = ", ".join(f"{quote_path(d.path)} ({d.what})" for d in found.differences[:NAMED])
    more = f" and {human.count(number - NAMED)} more" if number > NAMED else ""
    told = "time stamps say" if source == "scan" else f"{source} said"
    text = (
        f"{told} that nothing changed in {human.count(number, 'item')} of {name} that"
        f" {'differs' if number == 1 else 'differ'}: {first}{more}. All is scanned instead, and"
        " what differs is read."
    )
    if any(difference.what == _DATA for difference in found.differences):
        # No scan can see others like these: it goes by time stamps.
        return f"{text} To have every file read, `cloudfs sync {name} --verify-source 100%`."
    return f"{text} To go on without {source}, `cloudfs policy set {name} --snapshot scan`."


def summary(found: Verified) -> str:
    """What was looked at, in a few words."""
    words = [human.count(found.files, "file")]
    if found.directories:
        words.append(human.count(found.directories, "directory", "directories"))
    differ = human.count(len(found.differences)) if found.differences else "none"
    return f"{' and '.join(words)} verified ({human.size(found.bytes)}), {differ} differ"


def show_json(output: Output, found: Verified) -> dict[str, Any]:
    """Print an error for each difference; returns the part of the summary."""
    for difference in found.differences:
        output.event(
            {
                "message_type": "error",
                "error": {"message": f"called unchanged, but differs: {difference.what}"},
                "during": "verification",
                "item": difference.path,
            }
        )
    return {
        "files": found.files,
        "bytes": found.bytes,
        "directories": found.directories,
        "differences": len(found.differences),
    }
