"""A comparison in the terminal: one line a recipe, then what may be claimed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

MEASURED = {  # column → measure; those that a task does not have are left out
    "held-out loss": "held_out_loss",
    "exact": "exact",
    "edits": "edits",
    "accuracy": "accuracy",
    "macro F1": "macro_f1",
    "Pearson": "pearson",
    "Spearman": "spearman",
    "general text": "general_loss",
    "drift": "drift",
}
COLUMNS = ("recipe", *MEASURED, "parameters", "rank", "lr", "s a run", "peak")


def columns(summary: dict[str, Any]) -> list[str]:
    """The columns that some recipe has a value for."""
    return [c for c in COLUMNS if c not in MEASURED or any(MEASURED[c] in row for row in summary["rows"])]


def table(summary: dict[str, Any]) -> Table:
    """What training began with, then means ± half of the 95 % interval over the seeds; the best of a column is bold."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    shown, best = columns(summary), best_of(summary)
    for name in shown:
        made.add_column(name, justify="left" if name == "recipe" else "right", no_wrap=True)
    if summary["before"]:
        known = {c: summary["before"].get(MEASURED.get(c, "")) for c in shown}
        cells = ["" if value is None else f"{value:.3f}" for value in known.values()]
        made.add_row("(before)", *cells[1:], style="dim")
    for row in summary["rows"]:
        cells = cells_of(row)
        made.add_row(*(Text(cells[c], style="bold" if row["recipe"] == best.get(c) else "") for c in shown))
    return made


def best_of(summary: dict[str, Any]) -> dict[str, str]:
    """The recipe with the best mean, by column."""
    from veneer.analysis.summary import MEASURES

    found = {}
    for column in set(columns(summary)) & set(MEASURED):
        measure = MEASURED[column]
        known = [(row[measure]["mean"], row["recipe"]) for row in summary["rows"] if measure in row]
        if len({mean for mean, _ in known}) > 1 or len(known) == 1:
            found[column] = (min if MEASURES[measure] else max)(known)[1]
    return found


def cells_of(row: dict[str, Any]) -> dict[str, str]:
    """The texts of one recipe's row, by column."""
    parameters, seconds, peak = (row.get(m, {}).get("mean") for m in ("parameters", "seconds", "peak_memory"))
    return {
        "recipe": row["recipe"],
        "rank": "" if row["rank"] is None else str(row["rank"]),
        "parameters": "" if parameters is None else f"{parameters:,.0f}",
        "lr": "usual" if row["lr"] is None else f"{row['lr']:.2g}",
        **{column: with_interval(row.get(measure)) for column, measure in MEASURED.items()},
        "s a run": "" if seconds is None else f"{seconds:.1f}",
        "peak": "" if peak is None else f"{peak / 2**30:.2f} GiB",
    }


def with_interval(value: dict[str, Any] | None) -> str:
    """``1.234 ± 0.021``, its digits by the size of the interval; the mean alone where one seed gives no interval."""
    if value is None:
        return ""
    half = (value["high"] - value["low"]) / 2
    digits = 4 if 0 < half < 0.001 or half > 1e6 else 3
    return f"{value['mean']:.{digits}f}" + (f" ± {half:.{digits}f}" if half < 1e6 else "")


def cost_line(summary: dict[str, Any]) -> str:
    """What the search for learning rates cost."""
    runs = sum(row["search"]["runs"] for row in summary["rows"])
    spent = sum(row["search"]["seconds"] for row in summary["rows"])
    return f"search for learning rates: {runs} short runs, {spent:.0f} s in all" if runs else "no search: given rates"
