"""How each method of the registry is tried: a recipe for it, what it needs, which models it claims."""

from __future__ import annotations

from typing import Any

import torch
from models import KINDS, make

import veneer
from veneer.core import registry
from veneer.core.delta import Written
from veneer.core.hook import Schedule

EXAMPLES = {  # what a name alone does not say
    "x-lora": "x-lora(adapters=['a', 'b'])",
    "lora": "lora(alpha=8.0)",
    "lst": "lst(reduction=4)",
    "lst-fisher": "lst(reduction=4)+lst-fisher",
    "miss-mini": "miss-mini(columns=2)",
    "colora": "colora(points=2, steps=2)",
    "n2n": "n2n(epochs=1, rollouts=2, steps=1, ranks=(0, 4))",
    "flexora": "flexora(steps=2, batches=1, lr=0.01)",
    "s2ft": "s2ft(v=0.5, o=0.25, u=0.1, d=0.1)",
    "s2-lora-ranks": "s2-lora(shrink=1.5, normalise=True)",
    "composable-sft-ranks": "composable-sft(proportion=0.1, select='random')",
}
MODELS = {  # forms on whole modules, which not every architecture has
    "mixlora": ("llama", "gpt2", "t5"),
    "flexora": ("llama", "gpt2", "bert", "vit", "t5"),
    "lst": ("llama", "gpt2", "bert", "vit"),
    "lst-fisher": ("llama", "bert"),
    "sherl": ("llama", "gpt2", "bert", "vit"),
    "man": ("llama", "gpt2", "bert", "vit"),
    "mosa": ("llama", "gpt2", "vit", "t5"),
    "score-norm": ("llama", "gpt2", "bert", "vit", "t5"),  # queries, keys or values
    "mosa-consistency": ("llama", "vit"),
}


def recipe(method: registry.Method) -> str:
    """The recipe that tries a method alone."""
    return EXAMPLES.get(method.name, method.name)


def all_methods() -> list[registry.Method]:
    """Every method that a recipe can hold."""
    return [m for m in registry.methods() if m.axis not in ("merge", "protocol")]


def form(method: registry.Method) -> type:
    """The class that runs at the sites: the method's own, or the form it brings."""
    if method.axis in ("delta", "side", "mixture"):
        return method.cls
    part = veneer.core.recipe.parse(recipe(method)).part("delta")
    return part.method.cls if part else method.cls


def models_for(method: registry.Method) -> list[str]:
    """The models that have a layer kind the method claims."""
    kinds = getattr(method.cls, "layers", None) or form(method).layers
    found = MODELS.get(method.name) or dict.fromkeys(k for kind in kinds for k in KINDS[kind])
    return [k for k in found if k != "t5" or getattr(method.cls, "encoder_decoder", True)]


def cases() -> list[Any]:
    """(method, model kind) for the whole registry."""
    return [(m, kind) for m in all_methods() for kind in models_for(m)]


def name(value: Any) -> str:
    """A test id."""
    return getattr(value, "name", str(value))


def attached(method: registry.Method, kind: str, dtype: torch.dtype = torch.float32, **options: Any):
    """A fresh case and the method's adapter on it."""
    case = make(kind, dtype)
    if method.name == "x-lora":
        for i, label in enumerate("ab"):
            expert = veneer.attach(case.model, "lora", rank=2 + i, sites=case.sites, name=label, seed=i)
            moved(expert)
    fields = {"rank": 4} if _has_rank(method) else {}
    adapter = veneer.attach(
        case.model, recipe(method), sites=case.sites, calibration=case.calibration(),
        schedule=Schedule(steps=20, lr=1e-2), **(fields | options),
    )  # fmt: skip
    return case, adapter


def _has_rank(method: registry.Method) -> bool:
    from veneer.fields import fields_of

    return any("rank" in fields_of(p.method.cls) for p in veneer.core.recipe.parse(recipe(method)).parts)


def moved(adapter: Any, size: float = 0.1) -> None:
    """Put the trained tensors somewhere else than their start, the same place each time."""
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=g) * size)


def is_written(adapter: Any) -> bool:
    """Whether the adapter trains base tensors themselves."""
    return any(isinstance(d, Written) for d in adapter.deltas.values())
