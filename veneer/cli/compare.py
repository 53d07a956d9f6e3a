"""``veneer compare``: recipes side by side under one budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.options import Data, Model
from veneer.errors import UserError

QUICK = 32  # steps of a comparison when no budget is given


def command(
    recipes: Annotated[list[str], typer.Argument(help="Recipes, as in: lora dora lora+pissa.", show_default=False)],
    model: Model,
    data: Data,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps a run.", show_default=f"{QUICK}, when no other budget")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens a run, instead.", show_default=False)] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds of training a run, instead.", show_default=False)
    ] = None,
    parameters: Annotated[
        int | None, typer.Option(min=1, help="Trained numbers at most; ranks are chosen to fit.", show_default=False)
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank where a recipe leaves it open.", show_default="the form's own")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each recipe.")] = 3,
    search: Annotated[
        int, typer.Option(min=0, help="Learning rates tried for each recipe on validation rows; 0: its usual rate.")
    ] = 4,
    lr: Annotated[float | None, typer.Option(help="One learning rate for all: no search.", show_default=False)] = None,
    sites: Annotated[str, typer.Option(help="Where, as in `veneer train`.")] = "linear",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 8,
    max_length: Annotated[int | None, typer.Option(min=8, help="Tokens a row.", show_default="1024")] = None,
    template: Annotated[str | None, typer.Option(help="Chat template for prompts.", show_default=False)] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out data.", show_default="5% of the rows, by seed")
    ] = None,
    eval_rows: Annotated[int, typer.Option(min=1, help="Held-out rows at most.")] = 128,
    task: Annotated[
        str | None, typer.Option(help="What the model learns.", show_default="seen from the columns")
    ] = None,
    answers: Annotated[
        int, typer.Option(min=0, help="Held-out prompts answered, to count exact answers; 0: none.")
    ] = 0,
    general: Annotated[
        str | None,
        typer.Option(
            help="A text file to measure forgetting on.", show_default="Python's own reference, as it is English"
        ),
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Run the trials on a Ray cluster.")] = False,
    out: Annotated[str, typer.Option(help="Folder; the same command goes on where it was.")] = "comparison",
) -> None:
    """Train recipes under one budget and compare them: table, plots, a page, and what may be claimed.

    Every recipe gets the same batches in the same order, the same seeds and the same search for a learning rate, which
    never sees the held-out rows. A killed comparison goes on with the same command.
    """
    from veneer.analysis.budget import Budget
    from veneer.analysis.compare import Comparison, Here, OnRay
    from veneer.analysis.trials import Setting
    from veneer.report import comparison, comparison_page, comparison_plots
    from veneer.report.screen import screen

    for name, path in (("--data", data), ("--eval-data", eval_data), ("--general", general)):
        if path is not None and not Path(path).exists():
            raise UserError(f"{name}: there is no file or folder {path}")
    if steps is None and tokens is None and seconds is None:
        steps = QUICK
    setting = Setting(
        model=model, data=data, eval_data=eval_data, task=task, template=template, sites=sites, batch_size=batch_size,
        max_length=max_length, eval_rows=eval_rows, general=general, answers=answers,
    )  # fmt: skip
    made = Comparison(
        setting, recipes, Budget(steps, tokens, seconds, parameters),
        seeds=list(range(seeds)), search=search, lr=lr, rank=rank, out=out,
    )  # fmt: skip
    console = screen()
    tell = _Counter(console, made.runs() - made.finished())
    runners = OnRay(setting) if ray else Here(setting)
    summary = made.run(tell, runners)
    curves = {r: [f["curve"] for f in made.finals_of(r)] for r in summary["recipes"]}
    figures = comparison_plots.draw(summary, curves)
    paths = comparison_plots.save(figures, made.out)
    page = made.out / "report.html"
    page.write_text(comparison_page.page(summary, comparison_plots.panels(summary, curves)), encoding="utf-8")
    console.print(f"budget of each run: {summary['budget']}; {seeds} seeds")
    console.print(comparison.table(summary))
    console.print(comparison.cost_line(summary))
    for sentence in ["", *summary["short"], *summary["notes"], "", *summary["words"], ""]:
        console.print(sentence)
    console.print(f"page: {page}", soft_wrap=True)
    console.print(f"plots: {', '.join(str(p) for p in paths)}", soft_wrap=True)
    console.print(f"record: {made.out / 'trials.jsonl'}", soft_wrap=True)


class _Counter:
    """Says each finished run, how many there are, and the time left."""

    def __init__(self, console: object, expected: int) -> None:
        import time

        self.console, self.expected, self.done, self.clock = console, expected, 0, time.monotonic
        self.began = self.clock()

    def __call__(self, text: str) -> None:
        self.done += 1
        left = (self.clock() - self.began) / self.done * max(0, self.expected - self.done)
        self.console.print(f"[{self.done}/{self.expected}, about {left / 60:.0f} min left] {text}", markup=False)
