"""What a request's ``model`` means: the base, an adapter, or a blend of several; and which names are safe."""

from __future__ import annotations

import math
import re
from collections.abc import Container
from pathlib import Path

from veneer.errors import UserError, nearest
from veneer.serve.request import Blend

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
PARTS, HEAVIEST = 8, 10.0


def blend(model: str, base: str, known: Container[str]) -> Blend:
    """``name`` or ``a*0.7+b*0.3`` as (adapter, weight) pairs; the base is the empty blend. A weight left out is 1.

    Raises UserError for an unknown name, a weight that is no number from −10 to 10, or more than eight parts.
    """
    if model == base:
        return ()
    if model in known:
        return ((model, 1.0),)
    parts = [part.strip() for part in model.split("+")]
    if len(parts) > PARTS:
        raise UserError(f"a blend has at most {PARTS} adapters, not {len(parts)}")
    weights: dict[str, float] = {}
    for part in parts:
        name, star, number = (piece.strip() for piece in part.partition("*"))
        if name == base:
            raise UserError(
                f"a blend is made of adapters and {base!r} is the base, which is always there; leave it out"
            )
        if name not in known:
            raise UserError(_unknown(name, known))
        weight = _weight(number, part) if star else 1.0
        weights[name] = weights.get(name, 0.0) + weight
    return tuple(sorted(weights.items()))


def _unknown(name: str, known: Container[str]) -> str:
    shown = name if len(name) <= 60 else name[:60] + "…"
    return f"there is no model or adapter {shown!r} here{nearest(name[:60], list(known))}; GET /v1/models lists them"


def _weight(text: str, part: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not -HEAVIEST <= weight <= HEAVIEST:
        raise UserError(f"{part[:60]!r} needs a weight from −10 to 10 after the star")
    return weight


def checked(name: str) -> str:
    """The name of an adapter; raises UserError unless it is letters, digits, dots, dashes and underscores."""
    if not NAME.fullmatch(name):
        shown = name if len(name) <= 60 else name[:60] + "…"
        raise UserError(
            f"{shown!r} cannot name an adapter; up to 128 letters, digits, dots, dashes and underscores were expected, "
            "a letter or digit first"
        )
    return name


def inside(root: Path, name: str) -> Path:
    """The folder ``name`` right under ``root``; raises UserError for one that leaves it (by links too) or is absent."""
    folder = root / checked(name)
    if not folder.is_dir():
        raise UserError(f"there is no folder {name!r} among the adapters")
    if folder.resolve().parent != root.resolve():
        raise UserError(f"{name!r} leads out of the adapters' folder; copy the adapter into it")
    return folder
