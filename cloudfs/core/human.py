"""Sizes, counts and durations as people read and write them.

Shown sizes are in powers of ten with two or three figures. Read sizes follow their unit: "MB" is a
power of ten, "MiB" and the bare letter "M" (as dd and restic have it) are powers of two.
"""

from __future__ import annotations

import math
import re

_SHOWN_UNITS = ("KB", "MB", "GB", "TB", "PB", "EB")
_POWERS = "kmgtpe"
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgtpe])(i?b)?|b)?\s*", re.IGNORECASE | re.ASCII)
_SECONDS = {"s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION_PART = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(min|[smhdw])", re.IGNORECASE | re.ASCII)
_MAX_SIZE = 1 << 63


def size(count_bytes: int) -> str:
    """A size for people: "84 KB", "1.3 GB"."""
    if count_bytes < 1000:
        return f"{count_bytes} B"
    value = float(count_bytes)
    for unit in _SHOWN_UNITS:
        value /= 1000
        if value < 9.95:
            return f"{value:.1f} {unit}"
        if value < 999.5:
            return f"{value:.0f} {unit}"
    return f"{value:.0f} {_SHOWN_UNITS[-1]}"


def count(number: int, one: str = "", many: str = "") -> str:
    """A number with its thousands marked and, where given, the right form of its noun."""
    if not one:
        return f"{number:,}"
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def duration(seconds: float) -> str:
    """A duration for people: "0.3 s", "14 s", "4 min 10 s", "2 h 5 min", "3 days"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = math.floor(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return _two(whole, 60, "min", "s")
    if whole < 2 * 86400:
        return _two(whole // 60, 60, "h", "min")
    return f"{whole // 86400} days"


def _two(value: int, step: int, large: str, small: str) -> str:
    high, low = divmod(value, step)
    return f"{high} {large} {low} {small}" if low else f"{high} {large}"


def clock(seconds: float) -> str:
    """A time left, as a clock shows it: "0:01", "1:02:03"."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def exact_size(count_bytes: int) -> str:
    """A size that :func:`parse_size` reads back exactly: "128 KiB", "1000"."""
    for power, letter in reversed(list(enumerate(_POWERS, start=1))):
        unit = 1 << (10 * power)
        if count_bytes and count_bytes % unit == 0:
            return f"{count_bytes // unit} {letter.upper()}iB"
    return str(count_bytes)


def parse_size(text: str) -> int:
    """Bytes of "32 MiB", "64k", "1.5 GB" or "4096". Raises ValueError with a clear sentence."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f'"{text}" is no size; write it like "32 MiB" or "500 MB"')
    digits, letter, suffix = match.groups()
    factor = 1
    if letter:
        base = 1000 if suffix and suffix.lower() == "b" else 1024
        factor = base ** (1 + _POWERS.index(letter.lower()))
    value = int(digits) * factor if digits.isdigit() else round(float(digits) * factor)
    if value >= _MAX_SIZE:
        raise ValueError(f'"{text}" is larger than anything can be')
    return value


def parse_duration(text: str) -> float:
    """Seconds of "90", "15m", "1h 30min" or "2 d". Raises ValueError with a clear sentence."""
    stripped = text.strip()
    if re.fullmatch(r"\d+(\.\d+)?", stripped, re.ASCII):
        return float(stripped)
    total, position = 0.0, 0
    while position < len(stripped):
        match = _DURATION_PART.match(stripped, position)
        if match is None:
            break
        total += float(match[1]) * _SECONDS[match[2].lower()]
        position = match.end()
    if not stripped or position < len(stripped):
        raise ValueError(f'"{text}" is no duration; write it like "90 s", "15 min" or "1h30m"')
    return total


def parse_share(text: str) -> float:
    """A share, 0 to 1, of "5%", "0.5 %" or "5". Raises ValueError with a clear sentence."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%?\s*", text, re.ASCII)
    if match is None or float(match[1]) > 100:
        raise ValueError(f'"{text}" is no share; write it like "5%", from 0% to 100%')
    return round(float(match[1]) / 100, 12)


def share(value: float) -> str:
    """A share that :func:`parse_share` reads back: "5%", "0.5%"."""
    return f"{value * 100:.10g}%"
