"""``veneer export``: carry an adapter to other tools."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from veneer.cli.options import Model


def command(
    model: Model,
    adapter: Annotated[
        str, typer.Option(help="The adapter's folder, ours or PEFT's.", show_default=False, metavar="FOLDER")
    ],
    out: Annotated[str, typer.Option(help="Where to write; it must not exist yet.", show_default=False)],
    format: Annotated[
        Literal["peft", "gguf", "merged"],
        typer.Option(
            help="peft: a directory for PEFT; gguf: a LoRA file for llama.cpp; merged: a transformers directory "
            "with the change folded in."
        ),
    ] = "peft",
) -> None:
    """Write an adapter for PEFT, llama.cpp, or folded in."""
    from pathlib import Path

    import veneer
    from veneer.errors import UserError
    from veneer.report.screen import screen

    if Path(out).exists():
        raise UserError(f"--out {out} exists already; give another name or move it away")
    base, tokenizer = veneer.load_model(model)
    loaded = veneer.load(base, adapter)
    written = loaded.export(out, format=format)
    if format == "merged" and tokenizer is not None:
        tokenizer.save_pretrained(out)
    screen().print(f"wrote {written or out} ({format})", soft_wrap=True)
