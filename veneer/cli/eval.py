"""``veneer eval``: what a model scores with an adapter and without."""

from __future__ import annotations

from typing import Annotated

import typer

from veneer.cli.options import AdapterFolder, Data, Model


def command(
    model: Model,
    data: Data,
    adapter: AdapterFolder = None,
    task: Annotated[
        str | None, typer.Option(help="What the model learns.", show_default="the adapter's, or seen from the columns")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="How a prompt is written, as in training.", show_default=False)
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=8, help="Tokens after which a row is cut.", show_default="1024")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.", show_default="all")] = None,
) -> None:
    """Score a model on data, with an adapter and without."""
    import veneer
    from veneer.analysis.loading import model_and_examples
    from veneer.data import read_rows
    from veneer.report import tables
    from veneer.report.screen import screen
    from veneer.train.evaluate import scores
    from veneer.train.feed import RowFeed
    from veneer.train.processes import Processes
    from veneer.train.tasks import Task

    rows = read_rows(data, limit)
    base, dataset = model_and_examples(
        model, rows, task=task, template=template, max_length=max_length, adapter=adapter
    )
    what = Task(dataset.task)
    feed = RowFeed(dataset, what, batch_size, shuffle=False)
    columns = {"base": scores(base, feed, what, Processes(), base.dtype)}
    if adapter is not None:
        veneer.load(base, adapter)
        columns["with adapter"] = scores(base, feed, what, Processes(), base.dtype)
    console = screen()
    console.print(f"{len(dataset):,} rows of {dataset.name}, task {dataset.task}")
    console.print(tables.scores_table(columns))
