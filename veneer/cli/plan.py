"""``veneer plan``: what recipes will cost on this machine, before anything runs."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from veneer.cli.options import Model
from veneer.errors import UserError


def command(
    recipes: Annotated[list[str], typer.Argument(help="Recipes, as in: lora full lora+nf4.", show_default=False)],
    model: Model,
    data: Annotated[
        str | None, typer.Option(help="Training data: gives the usual length and the steps.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 8,
    length: Annotated[int | None, typer.Option(min=8, help="Tokens a row.", show_default="the data's, or 256")] = None,
    epochs: Annotated[float, typer.Option(min=0, help="Passes over --data.")] = 1.0,
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

    A probe of a few seconds on the real model measures what follows; the base stays as it is.
    """
    import veneer
    from veneer.analysis import plan
    from veneer.analysis.budget import takes_rank
    from veneer.core.recipe import parse
    from veneer.data import prepare
    from veneer.report.screen import screen
    from veneer.report.tables import plan_table

    room = plan.parsed_bytes(memory) if memory else plan.memory_at_hand()
    ranks = {recipe: rank if takes_rank(parse(recipe)) else None for recipe in recipes}
    base, tokenizer = veneer.load_model(model)
    if getattr(base, "get_output_embeddings", lambda: None)() is None:
        raise UserError(f"{model} is no language model; plan probes language models so far")
    steps = None
    if data is not None:
        rows = prepare(data, tokenizer)
        length = length or round(float(rows.lengths.mean()))
        steps = math.ceil(len(rows) / batch_size * epochs)
    found = []
    for recipe in recipes:
        job = plan.Job(recipe, ranks[recipe], sites, batch_size, length or 256, steps, checkpointing)
        found.append(plan.forecast(base, job, room))
    console = screen()
    console.print(f"{batch_size} rows × {length or 256} tokens a step, {room / 2**30:.2f} GiB of memory at hand")
    console.print(plan_table(found, room))
    refused = [f for f in found if not f.fits(room)]
    for one in refused:
        offers = [plan.words(other, one.job) for other in plan.alternatives(base, one, room)]
        console.print(
            f"{one.job.recipe} does not fit; " + (f"{', or '.join(offers)} fits" if offers else "nothing nearby fits")
        )
    if refused:
        names = ", ".join(f.job.recipe for f in refused)
        raise UserError(f"{names} needs more than {room / 2**30:.2f} GiB here; see the offers above")
