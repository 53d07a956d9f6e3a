"""The live panel of a training run in a terminal; plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

    from veneer.train.display import Display

BARS = "▁▂▃▄▅▆▇█"


def display(stream: TextIO | None = None, *, quiet: bool = False) -> Display:
    """The display that suits ``stream`` (standard output by default).

    A terminal gets the panel, a file or a pipe plain lines, at most one every five seconds; ``quiet`` gets nothing.
    """
    from veneer.train.display import Lines, Silent

    if quiet:
        return Silent()
    stream = stream or sys.stdout
    return Panel() if stream.isatty() else Lines(stream)


@contextmanager
def showing(stream: TextIO | None = None) -> Iterator[Display]:
    """``display`` for the length of a run: however it ends, the panel is closed and the cursor is back."""
    shown = display(stream)
    try:
        yield shown
    finally:
        if isinstance(shown, Panel):
            shown.close()


def sparkline(values: Sequence[float], width: int) -> str:
    """``values`` as at most ``width`` bars, each the mean of its share; lowest and highest span the bars' range."""
    if not values or width < 1:
        return ""
    columns = min(width, len(values))
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BARS[round((m - low) / span * (len(BARS) - 1))] for m in means)


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(int(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Panel:
    """A rich panel that redraws four times a second: step, time left, loss, held-out loss, rate, speed, memory.

    Sentences (``event``) scroll above it. It follows the display protocol of the training loop.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self.console = console or Console()
        self.total = 0
        self.losses: list[float] = []
        self.held_out: list[tuple[int, float]] = []
        self.values: dict[str, Any] = {}
        self._live: Live | None = None
        self._started = time.monotonic()

    def start(self, total: int, facts: dict[str, Any]) -> None:
        """Print the facts of the run and open the panel for ``total`` optimiser steps."""
        from rich.live import Live

        for name, value in facts.items():
            self.console.print(f"[dim]{name}[/dim] {value}", highlight=False)
        self.total, self._started = total, time.monotonic()
        self._live = Live(get_renderable=self.render, console=self.console, refresh_per_second=4)
        self._live.start()

    def step(self, values: dict[str, Any]) -> None:
        """Take the numbers of one optimiser step."""
        self.values = {**self.values, **values}
        self.losses.append(float(values["loss"]))
        if values.get("eval_loss") is not None:
            self.held_out.append((int(values["step"]), float(values["eval_loss"])))

    def event(self, text: str) -> None:
        """Print one sentence above the panel."""
        self.console.print(text, highlight=False, markup=False)

    def end(self, record: dict[str, Any]) -> None:
        """Close the panel and print what the run came to."""
        self.close()
        held = record.get("held_out") or {}
        if held.get("after") is not None:
            self.console.print(
                f"held-out loss {held['before']:.4f} → [bold]{held['after']:.4f}[/bold]", highlight=False
            )
        for warning in record.get("warnings", []):
            self.console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)

    def close(self) -> None:
        """Draw the last state and leave it on the screen; safe to call twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def render(self) -> RenderableType:
        """The panel as it stands."""
        from rich.panel import Panel as Frame
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        values, step = self.values, int(self.values.get("step", 0))
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        left = values.get("eta")
        grid.add_row(
            "step",
            f"{step}/{self.total}",
            ProgressBar(total=max(self.total, 1), completed=step),
        )
        grid.add_row(
            "time",
            f"{clock(time.monotonic() - self._started)}",
            "" if left is None else f"{clock(left)} left",
        )
        if self.losses:
            width = max(self.console.width - 34, 10)
            grid.add_row("loss", f"[bold]{self.losses[-1]:.4f}[/bold]", f"[cyan]{sparkline(self.losses, width)}[/cyan]")
        if self.held_out:
            at, loss = self.held_out[-1]
            grid.add_row("held-out", f"[bold]{loss:.4f}[/bold]", f"at step {at}")
        if "lr" in values:
            grid.add_row("rate", f"{values['lr']:.2e}", "")
        if "tokens_per_second" in values:
            grid.add_row("speed", f"{values['tokens_per_second']:,.0f} tokens/s", "")
        if "peak_memory" in values:
            grid.add_row("memory", f"{values['peak_memory'] / 2**30:.2f} GiB peak", "")
        return Frame(grid, title="veneer", title_align="left", border_style="dim")
