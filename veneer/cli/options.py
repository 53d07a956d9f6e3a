"""Options that several commands share, and options made from the fields of a class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from veneer.fields import Fields, fields_of

Model = Annotated[
    str,
    typer.Option(
        help="The base: smollm2-135m (packaged), a folder, a .gguf file or a hub name.", show_default=False, metavar="M"
    ),
]
AdapterFolder = Annotated[
    str | None,
    typer.Option(help="A folder written by save, by a run, or by PEFT.", show_default=False, metavar="FOLDER"),
]
Data = Annotated[
    str,
    typer.Option(
        help="A .jsonl, .json, .csv, .tsv, .parquet or .txt file, or a folder of images.",
        show_default=False,
        metavar="D",
    ),
]


def with_fields(fields: type[Fields], skip: Iterable[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for each field of ``fields``, besides the parameters that it names itself.

    The command takes them as ``**given``: only what the user typed arrives, so every default stays in one place.
    Help, type and default come from the field.
    """

    def extend(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        extra = [_option(field) for name, field in fields_of(fields).items() if name not in skip]

        def extended(**given: Any) -> None:
            names = {p.name for p in extra}
            command(**{k: v for k, v in given.items() if k not in names or v is not None})

        extended.__signature__ = inspect.Signature([*own, *extra])
        extended.__annotations__ = {p.name: p.annotation for p in (*own, *extra)}
        extended.__doc__ = command.__doc__
        return extended

    return extend


def _option(field: Any) -> inspect.Parameter:
    words = field.at.doc[:1].upper() + field.at.doc[1:] + (f", in {field.at.unit}" if field.at.unit else "") + "."
    shown = "" if field.default is None else f"  [default: {_shown(field.default)}]"
    option = typer.Option(help=words + shown, show_default=False)
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(field.name, kind, default=None, annotation=Annotated[field.hint | None, option])


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return f"{default:g}" if isinstance(default, float) else str(default)
