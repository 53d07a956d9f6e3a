"""The one error a user is meant to see."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What was given, what was expected and what to do, in one sentence.

    The command line prints it without a traceback and exits with status 2.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """``'; did you mean "x"?'`` for the known word closest to ``word``, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""
