"""``veneer data``: what each row becomes."""

from __future__ import annotations

from typing import Annotated

import typer

from veneer.cli.options import Data, Model


def command(
    data: Data,
    model: Model = "smollm2-135m",
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show.")] = 5,
    task: Annotated[
        str | None, typer.Option(help="What the model learns.", show_default="seen from the columns")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help='How a prompt is written: a text with {prompt} or a column in braces, "chat", or a Jinja text.',
            show_default="prompt and completion joined as they stand",
        ),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=8, help="Tokens after which a row is cut.", show_default="1024")
    ] = None,
) -> None:
    """Show what each row becomes, and which tokens train."""
    from veneer.analysis.loading import model_and_examples
    from veneer.data import read_rows, render_rows, summary
    from veneer.report import tables
    from veneer.report.screen import screen

    found = read_rows(data)  # before the model is loaded: what is wrong with the file is said at once
    _, dataset = model_and_examples(model, found, task=task, template=template, max_length=max_length, head=False)
    console = screen()
    for text in render_rows(dataset, dataset.processor, rows):
        console.print(text, soft_wrap=True)
    console.print()
    console.print(tables.data_table(summary(dataset)))
