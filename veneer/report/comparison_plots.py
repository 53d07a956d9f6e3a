"""Pictures of a comparison: loss over steps and seconds, score against cost with its Pareto front, error bars."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinct for most kinds of colour vision (Okabe and Ito 2008), readable on white and on near-black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C00", "#7F7F7F")
DECADE = 10  # spread of the parameters beyond which their axis is logarithmic
TEXT = "#808080"  # reads on light and on dark
PANELS = {  # of the picture of scores: those that every recipe has
    "held_out_loss": "held-out loss  ←",
    "exact": "exact answers  →",
    "accuracy": "accuracy  →",
    "pearson": "Pearson correlation  →",
    "general_loss": "loss on general text  ←",
}
SHARES = ("exact", "accuracy")  # in [0, 1], whatever an interval by Student says
COSTS = {
    "parameters": ("trained parameters", 1.0),
    "peak_memory": ("peak memory, GiB", 2.0**30),
    "seconds": ("seconds of training", 1.0),
}


def draw(summary: dict[str, Any], curves: dict[str, list[list[Sequence[float]]]]) -> dict[str, Figure]:
    """Figures by file stem: ``steps``, ``seconds``, ``scores``, ``pareto``.

    ``curves`` holds for each recipe the (step, seconds, loss) of each of its runs.
    """
    colours = {r: COLOURS[i % len(COLOURS)] for i, r in enumerate(summary["recipes"])}
    return {
        "steps": _curves(curves, colours, 0, "optimiser steps"),
        "seconds": _curves(curves, colours, 1, "seconds of training"),
        "scores": _scores(summary, colours),
        "pareto": _pareto(summary, colours),
    }


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
    """The figure as SVG text on a transparent ground."""
    import io

    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both numbers, smaller being better, by their first."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept


def _figure(columns: int = 1, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False, sharey=columns > 1)[0].tolist()
    for a in axes:
        a.grid(alpha=0.25, color=TEXT)
        a.tick_params(colors=TEXT)
        a.xaxis.label.set_color(TEXT)
        a.yaxis.label.set_color(TEXT)
        for side, spine in a.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(TEXT)
    return figure, axes


def _curves(curves: dict[str, Any], colours: dict[str, str], at: int, label: str) -> Figure:
    from veneer.report.plots import smoothed

    figure, (axes,) = _figure()
    for recipe, runs in curves.items():
        length = min((len(run) for run in runs), default=0)
        if not length:
            continue
        x = [statistics.fmean(run[i][at] for run in runs) for i in range(length)]
        y = smoothed([statistics.fmean(run[i][2] for run in runs) for i in range(length)])
        axes.plot(x, y, color=colours[recipe], linewidth=1.8, label=recipe)
    if at == 0:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(label)
    axes.set_ylabel("training loss, smoothed")
    _legend(axes)
    return figure


def _scores(summary: dict[str, Any], colours: dict[str, str]) -> Figure:
    rows = [row for row in summary["rows"] if "held_out_loss" in row]
    panels = [(m, label) for m, label in PANELS.items() if rows and all(m in row for row in rows)]
    figure, axes = _figure(max(1, len(panels)), 0.9 + 0.36 * max(2, len(rows)))
    for a, (measure, label) in zip(axes, panels):
        for place, row in enumerate(rows):
            value = row[measure]
            half = (value["high"] - value["low"]) / 2
            error = half if half < 1e6 else None
            a.errorbar(value["mean"], place, xerr=error, fmt="o", color=colours[row["recipe"]], capsize=4, markersize=7)
            a.plot(value["values"], [place] * len(value["values"]), "|", color=colours[row["recipe"]], alpha=0.6)
        a.set_xlabel(label)
        if measure in SHARES:
            low, high = a.get_xlim()
            a.set_xlim(max(low, -0.03), min(high, 1.03))
        a.locator_params(axis="x", nbins=5)
        a.set_yticks(range(len(rows)), [row["recipe"] for row in rows])
        a.set_ylim(len(rows) - 0.5, -0.5)
    return figure


def _pareto(summary: dict[str, Any], colours: dict[str, str]) -> Figure:
    figure, axes = _figure(len(COSTS), 3.8)
    rows = [row for row in summary["rows"] if "held_out_loss" in row]
    for a, (measure, (label, unit)) in zip(axes, COSTS.items()):
        points = [(row[measure]["mean"] / unit, row["held_out_loss"]["mean"]) for row in rows if measure in row]
        best = front(points)
        a.step(*zip(*best), where="post", color=TEXT, linewidth=1, linestyle="--") if best else None
        for row, (x, y) in zip(rows, points):
            a.plot(x, y, "o", color=colours[row["recipe"]], markersize=8, label=row["recipe"])
        a.set_xlabel(label)
        if measure == "parameters" and points and max(points)[0] > DECADE * min(points)[0] > 0:
            a.set_xscale("log")
        else:
            a.ticklabel_format(axis="x", style="plain", useOffset=False)
            a.locator_params(axis="x", nbins=4)
            a.xaxis.set_major_formatter(lambda value, _: f"{value:,.4g}" if value < 1e4 else f"{value / 1e6:.3g} M")
    axes[0].set_ylabel("held-out loss")
    if rows:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False, labelcolor=TEXT)
    return figure


def _legend(axes: Axes) -> Callable[..., Any]:
    return axes.legend(fontsize=8, frameon=False, labelcolor=TEXT)
