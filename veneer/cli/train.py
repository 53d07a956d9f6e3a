"""``veneer train``: fine-tune a model on a data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.options import Data, Model, with_fields
from veneer.errors import UserError
from veneer.train.settings import Settings

if TYPE_CHECKING:
    from veneer.data import Dataset, Rows

SHARE, MOST = 0.05, 200  # held out when no evaluation data is given
CALIBRATION = 32  # batches that a recipe may measure before it starts


@with_fields(Settings)
def command(
    model: Model,
    data: Data,
    recipe: Annotated[
        str, typer.Option(help="A sum of methods, fields in parentheses: lora(rank=8)+pissa; see `veneer methods`.")
    ] = "lora",
    rank: Annotated[
        int | None, typer.Option(help="Inner dimension of the change.", show_default="the form's own, 8 for lora")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Numerator of the scale.", show_default="the rank")] = None,
    dropout: Annotated[
        float | None, typer.Option(help="On the adapter's input, in training, 0 to 1.", show_default="0")
    ] = None,
    sites: Annotated[
        str,
        typer.Option(
            help="Where: linear, attention, mlp, all, conv, embedding, a glob, a regex, or several with commas."
        ),
    ] = "linear",
    eval_data: Annotated[
        str | None,
        typer.Option(help="Held-out data.", show_default=f"{SHARE:.0%} of the rows, at most {MOST}, by seed"),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder of the run.", show_default="runs/1, or the next free number")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint in --out.")] = False,
    **settings: Any,
) -> None:
    """Fine-tune a model on a data set.

    Shows progress, evaluates, writes checkpoints; leaves the adapter, its curves and its record in the run's folder.
    """
    chosen = Settings(**settings)  # what is cheap to check comes first: settings, folder, recipe, data
    folder = _folder(out, resume)

    import veneer
    from veneer.analysis.loading import model_and_examples
    from veneer.core.recipe import parse
    from veneer.data import read_rows
    from veneer.report import progress, tables
    from veneer.report.screen import screen
    from veneer.train.folder import RunFolder

    parse(recipe, rank=rank, alpha=alpha, dropout=dropout)
    rows = read_rows(data)
    held_rows = read_rows(eval_data) if eval_data else None
    RunFolder(folder, resume).close()
    console = screen()

    base, train = model_and_examples(
        model, rows, task=chosen.task, template=chosen.template, max_length=chosen.max_length, seed=chosen.seed
    )
    train, held = _held_out(train, held_rows, chosen, console)
    adapter = veneer.attach(
        base,
        recipe,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        sites=[part.strip() for part in sites.split(",")] if "," in sites else sites,
        calibration=_calibration(train, chosen),
        seed=chosen.seed,
    )
    console.print(tables.sites_table(adapter))
    with progress.showing() as display:
        veneer.fit(
            adapter,
            train,
            out=folder,
            eval_data=held,
            resume=resume,
            tokenizer=train.processor,
            display=display,
            **settings,
        )
    for name, path in (
        ("adapter", folder / "adapter"),
        ("curves", folder / "curves.png"),
        ("record", folder / "run.json"),
    ):
        console.print(f"{name}: {path}", soft_wrap=True)


def _folder(out: str | None, resume: bool) -> Path:
    if out is not None:
        return Path(out)
    if resume:
        raise UserError("--resume needs --out: the folder of the run to go on with")
    number = 1
    while Path("runs", str(number)).exists():
        number += 1
    return Path("runs", str(number))


def _held_out(train: Dataset, rows: Rows | None, settings: Settings, console: Any) -> tuple[Dataset, Dataset | None]:
    """Training and held-out examples: as given, or a share of the data; says which."""
    from veneer.data import prepare

    if rows is not None:
        held = prepare(
            rows,
            train.processor,
            task=train.task,
            max_length=settings.max_length,
            template=settings.template,
            label_names=train.label_names,
        )
        return train, held
    if len(train) < 2:
        console.print("one row: nothing is held out, so there is no held-out loss")
        return train, None
    train, held = train.split(SHARE, MOST, settings.seed)
    console.print(
        f"held out: {len(held)} of {len(held) + len(train):,} rows, drawn by seed {settings.seed}; "
        "--eval-data names your own"
    )
    return train, held


def _calibration(train: Dataset, settings: Settings) -> Iterator[dict[str, Any]]:
    """Batches of the training data, made only for a recipe that looks at them."""
    from veneer.data import Batches

    batches = Batches(train.lengths, settings.batch_size, seed=settings.seed)
    for k in range(min(CALIBRATION, len(batches))):
        yield train.batch(batches[k])
