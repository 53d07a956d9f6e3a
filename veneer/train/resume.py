"""What a run folder holds to go on from, and whether it is the same run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from veneer.errors import UserError
from veneer.train import checkpoint
from veneer.train.folder import RunFolder

LONG = ("data", "eval_data", "base")  # hashes: that they differ is all there is to say


def look(folder: RunFolder, identity: dict[str, Any], say: Callable[[str], None]) -> tuple[str, str | None]:
    """``("finished", None)``, ``("whole", path of the newest whole checkpoint)`` or ``("fresh", None)``.

    Raises UserError when the run was started with other arguments, data or base than ``identity`` holds.
    """
    record = folder.record()
    if record is not None and record.get("finished"):
        _same(record.get("identity", {}), identity, folder)
        say(f"the run in {folder.path} is finished ({record.get('steps')} steps): nothing to do")
        return "finished", None
    path, words = checkpoint.newest(folder)
    for sentence in words:
        say(sentence)
    if path is None:
        what = "no whole checkpoint" if folder.holds_run() else "no run"
        say(f"{folder.path} holds {what}: starting from the beginning")
        return "fresh", None
    _same(checkpoint.read_state(path, "identity"), identity, folder)
    say(f"going on from {path}")
    return "whole", str(path)


def _same(before: dict[str, Any], now: dict[str, Any], folder: RunFolder) -> None:
    differing = [k for k in now if k in before and before[k] != now[k]]
    if not differing:
        return
    said = [f"{k} has changed" if k in LONG else f"{k} was {before[k]!r} and is {now[k]!r}" for k in differing]
    raise UserError(
        f"the run in {folder.path} was started with something else: {'; '.join(said)}. "
        f"Give what it was started with, or another out folder"
    )
