"""A comparison in the terminal: one line a recipe, then what may be claimed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("recipe", "rank", "parameters", "lr", "held-out loss", "exact", "general text", "drift", "s a run", "peak")


def table(summary: dict[str, Any]) -> Table:
    """Means ± half of the 95 % interval over the seeds; the best mean of a column is bold."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    shown = [c for c in COLUMNS if c != "exact" or any("exact" in row for row in summary["rows"])]
    for name in shown:
        made.add_column(name, justify="left" if name == "recipe" else "right", no_wrap=name == "recipe")
    best = {m: _best(summary["rows"], m) for m in ("held_out_loss", "exact", "general_loss", "drift")}
    for row in summary["rows"]:
        cells = cells_of(row)
        bold = {"held-out loss": "held_out_loss", "exact": "exact", "general text": "general_loss", "drift": "drift"}
        made.add_row(
            *(Text(cells[c], style="bold" if row["recipe"] == best.get(bold.get(c, "")) else "") for c in shown)
        )
    return made


def cells_of(row: dict[str, Any]) -> dict[str, str]:
    """The texts of one recipe's row, by column."""
    parameters, seconds, peak = (row.get(m, {}).get("mean") for m in ("parameters", "seconds", "peak_memory"))
    return {
        "recipe": row["recipe"],
        "rank": "" if row["rank"] is None else str(row["rank"]),
        "parameters": "" if parameters is None else f"{parameters:,.0f}",
        "lr": "usual" if row["lr"] is None else f"{row['lr']:.2g}",
        "held-out loss": with_interval(row.get("held_out_loss")),
        "exact": with_interval(row.get("exact")),
        "general text": with_interval(row.get("general_loss")),
        "drift": with_interval(row.get("drift")),
        "s a run": "" if seconds is None else f"{seconds:.1f}",
        "peak": "" if peak is None else f"{peak / 2**30:.2f} GiB",
    }


def with_interval(value: dict[str, Any] | None) -> str:
    """``1.234 ± 0.021``; the mean alone where one seed gives no interval."""
    if value is None:
        return ""
    half = (value["high"] - value["low"]) / 2
    return f"{value['mean']:.4f}" + (f" ± {half:.4f}" if half < 1e6 else "")


def cost_line(summary: dict[str, Any]) -> str:
    """What the search for learning rates cost."""
    runs = sum(row["search"]["runs"] for row in summary["rows"])
    spent = sum(row["search"]["seconds"] for row in summary["rows"])
    return f"search for learning rates: {runs} short runs, {spent:.0f} s in all" if runs else "no search: given rates"


def _best(rows: list[dict[str, Any]], measure: str) -> str | None:
    from veneer.analysis.summary import MEASURES

    known = [(row[measure]["mean"], row["recipe"]) for row in rows if measure in row]
    return (min if MEASURES[measure] else max)(known)[1] if known else None
