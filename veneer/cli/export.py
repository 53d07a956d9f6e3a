"""``veneer export``: carry an adapter to other tools, and say what it lost on the way."""

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
        Literal["peft", "peft-lora", "gguf", "merged"],
        typer.Option(
            help="peft: a directory for PEFT; peft-lora: the same as plain LoRA whatever the form, which servers load; "
            "gguf: a LoRA file for llama.cpp; merged: a transformers directory with the change folded in."
        ),
    ] = "peft",
    server: Annotated[
        Literal["vllm"] | None,
        typer.Option(
            "--for",
            help="vllm: a directory that vLLM loads: plain LoRA of one rank, the scale within.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="peft-lora, gguf, vllm: the largest rank of a layer.", min=1, show_default=False)
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="peft-lora, gguf, vllm: the relative error of the weights allowed, as 0.01; the ranks follow.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write an adapter for PEFT, llama.cpp, vLLM, or folded in."""
    from pathlib import Path

    import veneer
    from veneer.analysis.loading import purpose_of
    from veneer.errors import UserError
    from veneer.report.screen import screen

    if Path(out).exists():
        raise UserError(f"--out {out} exists already; give another name or move it away")
    options = {name: v for name, v in (("rank", rank), ("tolerance", tolerance)) if v is not None}
    if server is not None and format not in ("peft", "peft-lora"):
        raise UserError(f"--for {server} writes plain LoRA, and --format {format} was asked for; give one of them")
    if options and server is None and format not in ("peft-lora", "gguf"):
        raise UserError(f"--{next(iter(options))} is for --format peft-lora or gguf, and {format} was asked for")
    purpose = purpose_of(adapter)
    base, tokenizer = veneer.load_model(model, task=purpose.get("task"), **purpose.get("head", {}))
    loaded = veneer.load(base, adapter)
    if server == "vllm":
        from veneer.io.files import read_json
        from veneer.io.peft_config import CONFIG
        from veneer.io.vllm import most, write

        done = write(loaded, out, **options)
        rank = max(done.ranks.values())
        folder = read_json(done.path / CONFIG).get("base_model_name_or_path") or model  # not a name that we alone know
        how = f"vllm serve {folder} --enable-lora --max-lora-rank {most(rank)} --lora-modules {Path(out).name}={out}"
        screen().print(f"wrote {done}\nserve it with: {how}", soft_wrap=True, markup=False, highlight=False)
        return
    written = loaded.export(out, format=format, **options)
    if format == "merged" and tokenizer is not None:
        tokenizer.save_pretrained(out)
    screen().print(f"wrote {written}" if format == "peft-lora" else f"wrote {written} ({format})", soft_wrap=True)
