"""``veneer demo``: the main job on a packaged model and packaged data."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    quick: Annotated[
        bool, typer.Option("--quick", help="Half a minute instead of minutes: fewer words, less learnt.")
    ] = False,
    out: Annotated[
        str | None, typer.Option(help="Folder of the run.", show_default="demo-run, or demo-run-2 … when it is taken")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split, the adapter's start and the order of the words.")] = 0,
    minutes: Annotated[
        float, typer.Option(min=0.5, help="Minutes that the whole demo may take; the number of words follows from it.")
    ] = 4.0,
) -> None:
    """Teach a small model to pronounce words, in five minutes.

    Fine-tunes the packaged SmolLM2-135M-Instruct on the CMU pronouncing dictionary, scores held-out words before
    and after; needs no network once it is installed.
    """
    from veneer.demo import job

    job.run(out=out, quick=quick, seed=seed, minutes=minutes)
