"""Bytes kept for backward, up to the last hidden state, over those that the frozen base alone keeps.

Counted by saved-tensor hooks: each storage once, in whole, those of the model's own tensors left out. 4 × 256 tokens
in bf16, rank 16 on all 210 linear layers. With the same attention in both (transformers' own), and with the one that
Veneer chooses, which keeps the probabilities of short rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from typing import Any

from bench.harness import Report, figure, main, parser
from bench.step import DROPOUT, QUICK_SHAPE, RANK, SHAPE, base_model, batch

MEGABYTE = 2**20


def measure(options: argparse.Namespace) -> Report:
    """The bytes of each case, which are the same in every run, and their ratios."""
    ids = batch(*(QUICK_SHAPE if options.quick else SHAPE))["input_ids"]
    bytes_of = {
        "base": floor(ids),
        "lora": ours(ids, "lora", leave=("attention",)),
        "lora, dropout": ours(ids, "lora", dropout=DROPOUT, leave=("attention",)),
        "dora": ours(ids, "dora", leave=("attention",)),
        "lora, own attention": ours(ids, "lora"),
        "lora, dropout, own attention": ours(ids, "lora", dropout=DROPOUT),
        "dora, own attention": ours(ids, "dora"),
        "peft": theirs(ids),
    }
    base = bytes_of["base"]
    targets = {"lora": 1.30, "lora, dropout": 1.30, "lora, own attention": 1.55, "lora, dropout, own attention": 1.55}
    figures = [
        figure(f"{name}, over the frozen base", found / base, at_most=targets.get(name))
        for name, found in bytes_of.items()
        if name != "base"
    ]
    figures += [figure(name, found / MEGABYTE, "MB") for name, found in bytes_of.items()]
    return Report(figures, bytes_of, {"dtype": "bfloat16", "rank": RANK, "shape": list(ids.shape)})


def kept(model: Any, run: Callable[[], Any]) -> int:
    """Bytes of the storages saved for backward by ``run``, those of the model's tensors left out."""
    import torch

    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(t: Any) -> Any:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # held by the graph, so that no address is used twice; an output itself would hold its graph

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    del out
    return sum(found.values())


def floor(ids: Any) -> int:
    """Of the frozen base with a gradient to the embeddings."""
    model = base_model()
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    return kept(model, lambda: model.model(inputs_embeds=x, use_cache=False).last_hidden_state)


def ours(ids: Any, recipe: str, dropout: float | None = None, leave: Collection[str] = ()) -> int:
    """Of the base with an adapter in the fast forms that ``causal_loss`` runs."""
    import veneer
    from veneer.models.fast import fast_forms
    from veneer.parts.plain import plain

    model = base_model()
    veneer.attach(model, recipe, rank=RANK, alpha=RANK, dropout=dropout)
    with fast_forms(model, plain, leave):
        return kept(model, lambda: model.model(input_ids=ids, use_cache=False).last_hidden_state)


def theirs(ids: Any) -> int:
    """Of PEFT's LoRA over the bf16 base."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    model = get_peft_model(base_model(), config)
    return kept(model, lambda: model.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state)


if __name__ == "__main__":
    main("memory_kept", measure, parser(__doc__).parse_args())
