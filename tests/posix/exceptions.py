"""What the live mount answers differently from the file system beneath, and why.

An exception is named by a case and a key of what it returns. A test fails where one is missing, and
where one is no longer one.
"""

from __future__ import annotations

EXCEPTIONS: dict[tuple[str, str], str] = {}
ONLY_ON: dict[tuple[str, str], str] = {}
