"""Tables for the terminal: what an adapter trains, examples before and after, the catalogue of methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table


class Example(NamedTuple):
    """One held-out example: what was asked, what was expected, what the model gave before and after training."""

    prompt: str
    expected: str
    before: str
    after: str


def sites_table(adapter: Any) -> Table:
    """What an adapter trains, one line for sites of the same role, form and shape."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("role", "form", "W, out × in", "rank", "sites", "parameters"):
        table.add_column(name, justify="left" if name in ("role", "form") else "right")
    for row in adapter.table():
        rank = "" if row["rank"] is None else str(row["rank"])
        sites, parameters = f"{row['sites']:,}", f"{row['parameters']:,}"
        table.add_row(row["role"], row["form"], row["shape"], rank, sites, parameters)
    return table


def share_line(adapter: Any) -> str:
    """``"210 sites, 4,884,480 of 139,400,448 parameters (3.5 %)"``: trained against the model's with the adapter's."""
    trained, total = adapter.parameter_count(), sum(p.numel() for p in adapter.model.parameters())
    return f"{len(adapter.sites)} sites, {trained:,} of {total:,} parameters ({100 * trained / total:.1f} %)"


def examples_table(examples: Sequence[Example], *, asked: str = "asked", width: int = 28) -> Table:
    """Examples side by side; an output that equals what was expected is green, long ones are cut at ``width``."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in (asked, "expected", "before", "after"):
        table.add_column(name, no_wrap=True)
    for example in examples:
        cells = [Text(_cut(example.prompt, width)), Text(_cut(example.expected, width))]
        for text in (example.before, example.after):
            cells.append(Text(_cut(text, width), style="green" if text == example.expected else ""))
        table.add_row(*cells)
    return table


def methods_table(methods: Iterable[Any]) -> Table:
    """The catalogue: name, axis, paper, parameters per site, what it needs beside it, what it does in one line."""
    from rich.table import Table

    from veneer.report.catalogue import parameters

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("name", "axis", "paper"):
        table.add_column(name, no_wrap=True)
    for name, width in (("parameters per site", 26), ("wants", 12), ("what it does", None)):
        table.add_column(name, max_width=width, overflow="fold")
    for method in methods:
        wants = ", ".join(method.wants)
        table.add_row(method.name, method.axis, method.paper, parameters(method), wants, method.summary)
    return table


def fields_table(rows: Iterable[tuple[str, str, str]]) -> Table:
    """Hyper-parameters of one method: (name, default, meaning) a line."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("field", "default"):
        table.add_column(name, no_wrap=True)
    table.add_column("meaning")
    for row in rows:
        table.add_row(*row)
    return table


def data_table(facts: dict[str, Any], named: int = 5) -> Table:
    """A data set's ``summary``: rows, tokens, lengths, classes, and the first ``named`` rows that train nothing."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    table.add_row("task", facts["task"])
    table.add_row("rows", f"{facts['kept']:,} of {facts['rows']:,} train")
    tokens = f"{facts['tokens']:,}, {facts['trained']:,} of them trained ({100 * facts['share_trained']:.0f} %)"
    if facts["task"] in ("causal", "seq2seq"):
        table.add_row("tokens", tokens)
    table.add_row("longest", f"{facts['longest']:,} tokens; {facts['truncated']:,} rows were cut")
    table.add_row("lengths", "  ".join(f"≤{bound}: {count:,}" for bound, count in facts["lengths"]))
    if facts["labels"]:
        table.add_row("classes", "  ".join(f"{name}: {count:,}" for name, count in facts["labels"].items()))
    for drop in facts["dropped"][:named]:
        table.add_row("left out", f"{drop['where']}: {drop['reason']}")
    if len(facts["dropped"]) > named:
        table.add_row("", f"… and {len(facts['dropped']) - named:,} more")
    return table


def scores_table(columns: dict[str, dict[str, float]]) -> Table:
    """Scores side by side, a column for each model; with two, the difference between them."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("score")
    for name in [*columns, *(["change"] if len(columns) == 2 else [])]:
        table.add_column(name, justify="right")
    for name in next(iter(columns.values())):
        values = [scores[name] for scores in columns.values()]
        change = [f"{values[1] - values[0]:+.4f}"] if len(values) == 2 else []
        table.add_row(name, *(f"{value:.4f}" for value in values), *change)
    return table


def _cut(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def plan_table(forecasts: Sequence[Any], room: int) -> Table:
    """What recipes will cost: parameters, file, optimiser state, peak memory, step and run time, whether it fits."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("recipe", "parameters", "file", "optimiser", "peak memory", "start", "step", "run", "fits"):
        table.add_column(name, justify="left" if name in ("recipe", "fits") else "right")
    for f in forecasts:
        known, steps = f.probed, f.job.steps
        table.add_row(
            f.job.recipe,
            f"{f.parameters:,}",
            f"{f.adapter_bytes / 2**20:.1f} MiB",
            f"{f.optimizer_bytes / 2**20:.1f} MiB",
            f"{'' if known else '> '}{f.memory / 2**30:.2f} GiB",
            f"{f.start:.1f} s",
            f"{f.step:.2f} s" if known else "",
            f"{f.step * steps / 60:.1f} min" if known and steps else "",
            "yes" if f.fits(room) else "no",
        )
    return table


def counted_table(rows: Sequence[dict[str, str]]) -> Table:
    """Equal rows as one line with their number."""
    from collections import Counter

    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in (*rows[0], "sites"):
        table.add_column(name, justify="right" if name == "sites" else "left")
    for values, count in Counter(tuple(row.values()) for row in rows).items():
        table.add_row(*values, f"{count:,}")
    return table
