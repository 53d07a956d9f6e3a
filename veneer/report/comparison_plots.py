"""Pictures of a comparison: loss over steps and seconds, score against cost with its Pareto front, error bars."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinct for most kinds of colour vision (Okabe and Ito 2008), readable on white and on near-black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C00", "#7F7F7F")
MARKERS = "os^DvPX*"  # a shape too, for those who see no difference in colour
DECADE = 10  # spread of the parameters beyond which their axis is logarithmic
TEXT = "#6e7781"  # of axes and labels; a page puts its own in place
PANELS = {  # of the picture of scores: those that every recipe has
    "held_out_loss": "held-out loss  ←",
    "exact": "exact answers  →",
    "accuracy": "accuracy  →",
    "pearson": "Pearson correlation  →",
    "general_loss": "loss on general text  ←",
}
SHARES = ("exact", "accuracy")  # in [0, 1], whatever an interval by Student says
GAINS = {"held_out_loss": "held-out loss", "exact": "exact answers", "accuracy": "accuracy", "pearson": "Pearson"}
COSTS = {
    "parameters": ("trained parameters", 1.0),
    "peak_memory": ("peak memory, GiB", 2.0**30),
    "seconds": ("seconds of training", 1.0),
}

Curves = dict[str, list[list[Sequence[float]]]]  # (step, seconds, loss) of each run, by recipe
Row = dict[str, Any]


class Look(NamedTuple):
    """How a recipe is drawn."""

    colour: str
    marker: str


def looks(recipes: Sequence[str]) -> dict[str, Look]:
    """A colour and a shape for each recipe."""
    return {r: Look(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, r in enumerate(recipes)}


def draw(summary: dict[str, Any], curves: Curves) -> dict[str, Figure]:
    """Figures by file stem, each with a legend: ``steps``, ``seconds``, ``scores``, ``pareto``."""
    look, rows = looks(summary["recipes"]), _whole(summary)
    found: dict[str, Figure] = {}
    for at, stem in enumerate(("steps", "seconds")):
        found[stem], [[axes]] = _figure(7.2, 3.8)
        _curves(axes, curves, look, at)
    measures = _measures(rows, PANELS)
    found["scores"], [line] = _figure(7.2, 0.9 + 0.36 * max(2, len(rows)), columns=max(1, len(measures)), sharey=True)
    for axes, measure in zip(line, measures):
        _score(axes, rows, look, measure)
    gains = _measures(rows, GAINS)
    found["pareto"], grid = _figure(7.2, 0.8 + 3.0 * max(1, len(gains)), len(COSTS), max(1, len(gains)), sharey="row")
    for line, gain in zip(grid, gains):
        for axes, cost in zip(line, COSTS):
            _pareto(axes, rows, look, gain, cost)
            axes.set_ylabel(GAINS[gain] if axes is line[0] else "")
    for stem in ("steps", "seconds", "pareto"):
        figure = found[stem]
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, labelcolor=TEXT)
    return found


def panels(summary: dict[str, Any], curves: Curves) -> dict[str, list[tuple[str, Figure]]]:
    """The same for a page, which has the legend: (what it shows, a figure) of ``scores``, ``pareto`` and ``curves``."""
    look, rows = looks(summary["recipes"]), _whole(summary)
    found: dict[str, list[tuple[str, Figure]]] = {"scores": [], "pareto": [], "curves": []}
    for measure in _measures(rows, PANELS):
        figure, [[axes]] = _figure(4.2, 0.8 + 0.32 * max(2, len(rows)))
        _score(axes, rows, look, measure)
        found["scores"].append((PANELS[measure].rstrip(" ←→"), figure))
    for gain in _measures(rows, GAINS):
        for cost, (label, _) in COSTS.items():
            figure, [[axes]] = _figure(4.0, 3.4)
            _pareto(axes, rows, look, gain, cost)
            found["pareto"].append((f"{GAINS[gain]} against {label}", figure))
    for at, label in enumerate(("optimiser steps", "seconds")):
        figure, [[axes]] = _figure(4.2, 3.2)
        _curves(axes, curves, look, at)
        found["curves"].append((f"training loss over {label}", figure))
    return found


def save(figures: dict[str, Figure], folder: Path) -> list[Path]:
    """Each figure as a PNG on white."""
    from veneer.io.files import write_whole

    paths = []
    for stem, figure in figures.items():
        path = folder / f"{stem}.png"
        write_whole(path, lambda out, f=figure: f.savefig(out, format="png", dpi=140, facecolor="white"))
        paths.append(path)
    return paths


def svg(figure: Figure) -> str:
    """The figure as SVG text on a transparent ground, in the page's own type; its axes take the page's ``--quiet``."""
    import io

    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "veneer"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue().replace(TEXT, f"var(--quiet, {TEXT})").replace("'DejaVu Sans'", "system-ui")
    return text[text.index("<svg") :]


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both numbers, smaller being better, by their first."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept


def _whole(summary: dict[str, Any]) -> list[Row]:
    """The rows of recipes that some run came through with."""
    return [row for row in summary["rows"] if "held_out_loss" in row]


def _measures(rows: Sequence[Row], among: Iterable[str]) -> list[str]:
    """Those that every row has and, but for the loss, that are not the same for all."""
    known = [m for m in among if rows and all(m in row for row in rows)]
    return [m for m in known if m == "held_out_loss" or len({row[m]["mean"] for row in rows}) > 1]


def _figure(
    wide: float, high: float, columns: int = 1, lines: int = 1, sharey: bool | str = False
) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(wide, high), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=sharey).tolist()
    for a in (a for line in grid for a in line):
        a.grid(alpha=0.25, color=TEXT)
        a.set_axisbelow(True)
        a.tick_params(colors=TEXT)
        a.xaxis.label.set_color(TEXT)
        a.yaxis.label.set_color(TEXT)
        for side, spine in a.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(TEXT)
    return figure, grid


def _curves(axes: Axes, curves: Curves, look: dict[str, Look], at: int) -> None:
    from veneer.report.plots import smoothed

    for recipe, runs in curves.items():
        length = min((len(run) for run in runs), default=0)
        if not length:
            continue
        x = [statistics.fmean(run[i][at] for run in runs) for i in range(length)]
        y = smoothed([statistics.fmean(run[i][2] for run in runs) for i in range(length)])
        axes.plot(x, y, color=look[recipe].colour, linewidth=1.6, label=recipe)
    if at == 0:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel=("optimiser steps", "seconds of training")[at], ylabel="training loss, smoothed")


def _score(axes: Axes, rows: Sequence[Row], look: dict[str, Look], measure: str) -> None:
    for place, row in enumerate(rows):
        value, (colour, marker) = row[measure], look[row["recipe"]]
        axes.errorbar(
            value["mean"], place, xerr=_half(value), fmt=marker, color=colour, capsize=4, markersize=7, elinewidth=1.4
        )
        axes.plot(value["values"], [place] * len(value["values"]), "|", color=colour, alpha=0.7)
    axes.set_xlabel(PANELS[measure])
    if measure in SHARES:
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, -0.03), min(high, 1.03))
    axes.locator_params(axis="x", nbins=5)
    axes.set_yticks(range(len(rows)), [row["recipe"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)


def _pareto(axes: Axes, rows: Sequence[Row], look: dict[str, Look], gain: str, cost: str) -> None:
    """A score against a cost: means with their intervals, and the front of what nothing beats in both means."""
    from veneer.analysis.summary import MEASURES

    label, unit = COSTS[cost]
    known, sign = [row for row in rows if cost in row], 1 if MEASURES[gain] else -1
    points = [(row[cost]["mean"] / unit, row[gain]["mean"]) for row in known]
    best = [(x, sign * y) for x, y in front((x, sign * y) for x, y in points)]
    axes.step(*zip(*best), where="post", color=TEXT, linewidth=1, linestyle="--") if best else None
    for row, (x, y) in zip(known, points):
        colour, marker = look[row["recipe"]]
        axes.errorbar(x, y, yerr=_half(row[gain]), xerr=_half(row[cost], unit), fmt="none", ecolor=colour, alpha=0.55)
        axes.plot(x, y, marker, color=colour, markersize=8, label=row["recipe"], linestyle="none")
    if gain in SHARES:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.03), min(high, 1.03))
    axes.set(xlabel=label, ylabel=GAINS[gain])
    _cost_axis(axes, cost, [x for x, _ in points])


def _cost_axis(axes: Axes, cost: str, seen: Sequence[float]) -> None:
    """Few round numbers along a cost; a logarithmic axis for parameters that lie decades apart."""
    from matplotlib.ticker import LogLocator, NullLocator

    if cost == "parameters" and seen and max(seen) > DECADE * min(seen) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=5))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))


def _short(value: float) -> str:
    """``12.5 M``, ``300 k``, ``1.25``."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _half(value: dict[str, Any], unit: float = 1.0) -> float | None:
    """Half of an interval; None where one seed gives none, or nothing varies."""
    half = (value["high"] - value["low"]) / 2
    return half / unit if 0 < half < 1e12 and math.isfinite(half) else None
