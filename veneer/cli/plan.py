"""``veneer plan``: what recipes will cost on this machine, before anything runs."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from veneer.cli.options import Model
from veneer.errors import UserError

LENGTH = 256  # tokens a row, when nothing says more


def command(
    recipes: Annotated[list[str], typer.Argument(help="Recipes, as in: lora full lora+nf4.", show_default=False)],
    model: Model,
    data: Annotated[
        str | None, typer.Option(help="Training data: its rows are probed; gives the steps.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 8,
    length: Annotated[
        int | None, typer.Option(min=8, help="Tokens a row.", show_default=f"{LENGTH}, without --data")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="What the model learns.", show_default="seen from the data, or the model's own")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over --data.")] = 1.0,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank where a recipe leaves it open.", show_default="the form's own")
    ] = None,
    sites: Annotated[str, typer.Option(help="Where, as in `veneer train`.")] = "linear",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations in backward.")] = False,
    memory: Annotated[
        str | None, typer.Option(help="Memory at hand, such as 8GiB.", show_default="what is free here")
    ] = None,
) -> None:
    """Predict parameters, file size, peak memory and step time of recipes; exit with 2 when one will not fit.

    A probe of a few seconds on the real model measures what follows; with --data on the data's own rows.
    """
    import veneer
    from veneer.analysis import plan
    from veneer.analysis.budget import takes_rank
    from veneer.analysis.loading import model_and_examples
    from veneer.core.recipe import parse
    from veneer.data import read_rows
    from veneer.report.screen import screen
    from veneer.report.tables import plan_table

    room = plan.parsed_bytes(memory) if memory else plan.memory_at_hand()
    ranks = {recipe: rank if takes_rank(parse(recipe)) else None for recipe in recipes}
    if data is not None and length is not None:
        raise UserError(f"--length {length} and --data were both given; the data's rows have their own lengths")
    if epochs <= 0:
        raise UserError(f"--epochs {epochs:g} passes over nothing: give a number above 0")
    rows = None if data is None else read_rows(data)
    examples = None if rows is None else model_and_examples(model, rows, task=task)[1]

    def load() -> Any:
        return veneer.load_model(model, task=task)[0] if rows is None else model_and_examples(model, rows, task=task)[0]

    planner = plan.Planner(load, task, examples)
    steps = None if examples is None else math.ceil(len(examples) / batch_size * epochs)
    shape = f"rows of {examples.name}" if examples is not None else planner.words(length or LENGTH)
    found = []
    for recipe in recipes:
        job = plan.Job(recipe, ranks[recipe], sites, batch_size, length or LENGTH, steps, checkpointing)
        found.append(planner.forecast(job, room))
    console = screen()
    console.print(f"{batch_size} {shape} a step, {room / 2**30:.2f} GiB of memory at hand")
    console.print(plan_table(found, room))
    refused = [f for f in found if not f.fits(room)]
    for one in refused:
        offers = [plan.words(other, one.job) for other in planner.alternatives(one, room)]
        console.print(
            f"{one.job.recipe} does not fit; " + (f"{', or '.join(offers)} fits" if offers else "nothing nearby fits")
        )
    if refused:
        names = ", ".join(f.job.recipe for f in refused)
        raise UserError(f"{names} needs more than {room / 2**30:.2f} GiB here; see the offers above")
