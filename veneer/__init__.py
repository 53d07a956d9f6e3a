"""Veneer: adapt pretrained models with thin learned layers.

Every public name is loaded when it is first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Adapter": "api",
    "Schedule": "numerics.schedule",
    "UserError": "errors",
    "adapters": "core.adapter",
    "attach": "api",
    "causal_loss": "train.loss",
    "find_sites": "core.site",
    "fit": "train.loop",
    "load": "api",
    "load_model": "models.load",
    "methods": "core.registry",
    "untie": "parts.folding",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    return getattr(import_module(f"veneer.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
