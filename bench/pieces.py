"""Benches that run in pieces: what the last result holds besides what is measured now."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.harness import RESULTS


def can_add(made: argparse.ArgumentParser) -> None:
    """Give a bench the option that `earlier` serves."""
    made.add_argument("--add", action="store_true", help="keep what the last result holds besides")


def earlier(name: str, settings: dict[str, Any], folder: Path = RESULTS) -> dict[str, Any]:
    """The samples in ``folder/NAME.json``; none where there is no such file, or one of other settings.

    Of settings with ``recipes``, one a sample, those samples are kept whose recipe is the same.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        return {}
    last = json.loads(path.read_text(encoding="utf-8"))
    then, now = dict(last["settings"]), dict(settings)
    old, new = then.pop("recipes", {}), now.pop("recipes", {})
    return {k: v for k, v in last["samples"].items() if old.get(k) == new.get(k)} if then == now else {}
