"""Pictures of a run, drawn without a screen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SHADE, ACCENT, QUIET = "#1f4e79", "#9dc3e6", "#c55a11", "#7f7f7f"


def curves(run_dir: str | Path, title: str | None = None) -> Path:
    """Draw ``curves.png`` from ``run.jsonl`` in a run folder and give its path.

    The title is the recipe of ``run.json`` when none is given.

    Raises:
        UserError: the folder has no ``run.jsonl``, or none of its lines holds a training loss.
    """
    from veneer.io.files import write_whole

    folder = Path(run_dir)
    log = folder / "run.jsonl"
    if not log.is_file():
        raise UserError(f"{folder} holds no run.jsonl; give the folder of a training run")
    figure = draw(_rows(log), title=_title(folder) if title is None else title)
    path = folder / "curves.png"
    write_whole(path, lambda scratch: figure.savefig(scratch, format="png", dpi=150))
    return path


def draw(rows: Sequence[dict[str, Any]], title: str = "") -> Figure:
    """The figure of a run's rows: loss as it came, smoothed, held-out loss as points, and the learning rate below.

    ``rows`` are the lines of ``run.jsonl``: those with ``loss`` (and ``lr``) are training steps, those with
    ``eval_loss`` evaluations; ``step`` counts optimiser steps from 1.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [row for row in rows if row.get("loss") is not None and "step" in row]
    held = [row for row in rows if row.get("eval_loss") is not None and "step" in row]
    if not steps:
        raise UserError("the run's log holds no training step; there is nothing to draw")
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    x, y = [row["step"] for row in steps], [row["loss"] for row in steps]
    loss_axes.plot(x, y, color=SHADE, linewidth=0.8, label="training loss")
    loss_axes.plot(x, smoothed(y), color=INK, linewidth=2.0, label="training loss, smoothed")
    if held:
        loss_axes.plot(
            [row["step"] for row in held],
            [row["eval_loss"] for row in held],
            color=ACCENT,
            linewidth=1.4,
            marker="o",
            markersize=5,
            label="held-out loss",
        )
    loss_axes.set_ylabel("loss (nats per token)")
    loss_axes.set_ylim(bottom=0, top=_top(y, [row["eval_loss"] for row in held]))
    loss_axes.legend(frameon=False, loc="upper right")
    rates = [row for row in steps if row.get("lr") is not None]
    rate_axes.plot([row["step"] for row in rates], [row["lr"] for row in rates], color=QUIET, label="learning rate")
    rate_axes.set_ylabel("rate")
    rate_axes.set_ylim(bottom=0)
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate_axes.set_xlabel("optimiser step")
    for axes in (loss_axes, rate_axes):
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    if title:
        loss_axes.set_title(title, loc="left", fontsize=11)
    return figure


def smoothed(values: Sequence[float], share: float = 0.03) -> list[float]:
    """The mean of an exponential average from the left and one from the right, so that the curve does not lag.

    Each averages over about ``share`` of the run and is corrected for its empty start.
    """
    keep = 1.0 - 1.0 / max(share * len(values), 1.0)
    right = _averaged(values[::-1], keep)[::-1]
    return [(a + b) / 2 for a, b in zip(_averaged(values, keep), right, strict=True)]


def _averaged(values: Sequence[float], keep: float) -> list[float]:
    total, weight, out = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight)
    return out


def _top(losses: Sequence[float], held: Sequence[float]) -> float:
    """The upper end of the loss axis: a first spike must not flatten the rest of the curve."""
    ordered = sorted(losses)
    high = ordered[min(int(0.99 * len(ordered)), len(ordered) - 1)]
    return 1.08 * max(high, *held, 1e-6)


def _rows(log: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(log.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            raise UserError(f"{log}, line {number}, is not JSON; the log of the run is damaged") from None
    return rows


def _title(folder: Path) -> str:
    from veneer.io.files import read_json

    record = folder / "run.json"
    if not record.is_file():
        return ""
    facts = read_json(record)
    return str(facts.get("recipe") or "")
