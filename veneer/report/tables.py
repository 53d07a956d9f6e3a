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
    """What an adapter trains, one line for sites of the same role and shape: form, sites, shape, parameters."""
    from rich.table import Table

    groups: dict[tuple[str, str, str], list[int]] = {}
    for path, delta in adapter.deltas.items():
        site = delta.site
        shape = f"{site.out_features} × {site.in_features}"
        trained = sum(p.numel() for p in delta.parameters(recurse=True) if p.requires_grad)
        rank = getattr(delta, "rank", None)
        form = delta.name + (f", rank {rank}" if rank is not None else "")
        groups.setdefault((site.role or path, shape, form), []).append(trained)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("role", "W, out × in", "form"):
        table.add_column(name)
    for name in ("sites", "parameters"):
        table.add_column(name, justify="right")
    for (role, shape, form), counts in groups.items():
        table.add_row(role, shape, form, str(len(counts)), f"{sum(counts):,}")
    return table


def share_line(adapter: Any) -> str:
    """``"210 sites, 4,884,480 of 139,400,640 parameters (3.5 %)"``: trained against all of the model's, adapter in."""
    trained = sum(p.numel() for _, p in adapter.named_parameters())
    total = sum(p.numel() for p in adapter.model.parameters())
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
    """The catalogue: name, axis, paper, what the method needs beside it, first sentence of its docstring."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("name", "axis", "paper", "wants"):
        table.add_column(name, no_wrap=True)
    table.add_column("what it does", overflow="fold")
    for method in methods:
        table.add_row(method.name, method.axis, method.paper, ", ".join(method.wants), method.summary)
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


def _cut(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
