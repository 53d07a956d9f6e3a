"""Carrying an adapter to other tools."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.core.adapter import Adapter
from veneer.errors import UserError, nearest

if TYPE_CHECKING:
    from veneer.io.certificate import Certificate

# format → (module, options it sets)
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft": ("peft_write", {}),
    "peft-lora": ("certificate", {}),
    "gguf": ("gguf", {}),
    "merged": ("merged", {}),
    "vllm": ("vllm", {}),
}


def export(adapter: Adapter, path: str | Path, *, format: str = "peft", **options: Any) -> Path | Certificate:
    """Write the adapter for another tool; returns the path written, with its error for ``peft-lora``.

    Args:
        adapter: what to write; it and its model stay as they are.
        path: a directory, for ``gguf`` a file.
        format: ``peft`` (the adapter in PEFT's form of it, plain LoRA where PEFT has none), ``peft-lora`` (plain LoRA
            in any case, with the error that this makes), ``vllm`` (the same in what vLLM reads), ``gguf`` (a GGUF LoRA
            for llama.cpp), ``merged`` (the model as a transformers directory).
        options: of the format's own ``write``: ``rank``, ``tolerance``, ``batches``, ``seed`` for ``peft-lora`` and
            ``vllm``; ``dtype``, ``rank``, ``tolerance`` for ``gguf``; ``tokenizer``, ``dtype``, ``max_shard_size`` for
            ``merged``.

    Raises:
        UserError: for a format or option that does not exist, and for what the format cannot express.
    """
    if format not in FORMATS:
        raise UserError(f"format={format!r} is not one that is written{nearest(format, FORMATS)}: {', '.join(FORMATS)}")
    module, fixed = FORMATS[format]
    write: Callable[..., Any] = import_module(f"veneer.io.{module}").write
    known = [n for n, p in inspect.signature(write).parameters.items() if p.kind is p.KEYWORD_ONLY and n not in fixed]
    for name in options:
        if name not in known:
            raise UserError(
                f"format={format!r} has no option {name!r}{nearest(name, known)} (it has: {', '.join(known) or 'none'})"
            )
    with _unfolded(adapter):
        return write(adapter, path, **fixed, **options)


@contextmanager
def _unfolded(adapter: Adapter) -> Iterator[None]:
    """With the change beside the weights, from where it is read."""
    folded = adapter.name in adapter.root.switch.folded
    if folded:
        adapter.unfold()
    try:
        yield
    finally:
        if folded:
            adapter.fold()
