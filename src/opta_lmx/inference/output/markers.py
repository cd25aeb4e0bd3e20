"""Finds markers in text that arrives in pieces."""

import re
from collections.abc import Iterable


def marker_pattern(literals: Iterable[str]) -> re.Pattern[str]:
    """Matches the first of ``literals``, as group 1, or at the end of the text what may become one, with no group."""
    known = sorted(set(literals), key=len, reverse=True)
    if not known:
        return re.compile(r"(\b\B)")
    whole = "|".join(map(re.escape, known))
    begun = "|".join(_beginnings(literal) for literal in known)
    return re.compile(rf"({whole})|(?:{begun})\Z")


def risky_pattern(literals: Iterable[str], *, spaces: str) -> re.Pattern[str]:
    """Matches a piece of text with which a marker may begin, or that ends in one of ``spaces``."""
    firsts = "".join(sorted({re.escape(literal[0]) for literal in literals}))
    choices = [rf"[{firsts}]"] * bool(firsts) + [rf"[{spaces}]\Z"] * bool(spaces)
    return re.compile("|".join(choices) or r"\b\B")


def _beginnings(literal: str) -> str:
    """A pattern for every proper beginning of ``literal``."""
    pattern = ""
    for char in reversed(literal[:-1]):
        pattern = re.escape(char) + (f"(?:{pattern})?" if pattern else "")
    return pattern or r"(?!)"
