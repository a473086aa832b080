"""The names of Unicode's characters as a corpus, by kind of script.

Python has them in it, so the text is on every machine; and it is the same in every Python, as names
never change and version 3.2 is the one that `unicodedata.ucd_3_2_0` keeps. In the order of code
points, neighbours are of one kind: alphabets of Europe and the Near East, of South and East
Asia, symbols, musical and mathematical notation.
"""

from __future__ import annotations

from unicodedata import ucd_3_2_0 as unicode

CODE_POINTS = 0x20000  # ideographs, whose names are numbers, follow
NUMBERED = ("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "HANGUL SYLLABLE", "VARIATION")
HELD_OUT = 8  # every eighth name
ALPHABET = "\n -0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def names() -> list[str]:
    """Return the names, by code point."""
    found = (unicode.name(chr(code), "") for code in range(CODE_POINTS))
    return [name for name in found if name and not name.startswith(NUMBERED)]


def domains(count: int) -> list[list[str]]:
    """Return the names in contiguous shares of about equal length."""
    everything = names()
    length = sum(len(name) + 1 for name in everything)
    shares: list[list[str]] = [[] for _ in range(count)]
    before = 0
    for name in everything:
        shares[before * count // length].append(name)
        before += len(name) + 1
    return shares


def split(share: list[str]) -> tuple[list[str], list[str]]:
    """Return the names to train on, and those held out."""
    return [n for k, n in enumerate(share) if k % HELD_OUT], share[::HELD_OUT]
