"""The catalogue of methods, filled by walking the method folders."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from veneer.errors import UserError, nearest

AXES = ("delta", "init", "ranks", "optim", "objective", "base", "side", "mixture", "merge", "protocol")
SINGLE = ("delta", "init", "ranks", "base", "side", "mixture")  # at most one of each in a recipe
FOLDERS = ("deltas", "inits", "ranks", "optim", "objectives", "bases", "sides", "mixtures", "merging", "protocols")
WORDS = {
    "pair": "one plain pair of factors A and B at each site",
    "components": "rank-one components that can be gated, grown and pruned",
    "core": "a small trained core between frozen factors",
    "magnitude": "a trained magnitude for each output row",
    "linear": "an update that is linear in the input",
    "foldable": "an update that folds into W",
    "frozen-base": "a base whose weights stay as they are",
    "dense-gradient": "gradients of the dense weights themselves",
    "replica": "the same decisions on every replica",
}


@dataclass(frozen=True)
class PeftMap:
    """How a delta is written in a PEFT directory.

    ``fields`` maps our field to the config's, ``keys`` our slot to the tensor's suffix, ``config`` holds constants
    (``...``: whatever, but not None). Without ``write`` the kind is read only, and written as plain LoRA.
    """

    type: str
    fields: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    write: bool = True


@dataclass(frozen=True)
class Method:
    """One entry of the catalogue."""

    name: str
    axis: str
    cls: type
    paper: str = ""
    system: int | str | None = None
    gives: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()
    defaults: str = ""

    @property
    def summary(self) -> str:
        """The first line of the class's docstring."""
        return (self.cls.__doc__ or "").strip().split("\n")[0]


_methods: dict[str, Method] = {}
_systems: dict[str, str] = {}
_walked: list[bool] = []


def method(
    name: str,
    *,
    axis: str,
    paper: str = "",
    system: int | str | None = None,
    gives: Iterable[str] = (),
    wants: Iterable[str] = (),
    defaults: str = "",
    aliases: Iterable[str] = (),
) -> Callable[[type], type]:
    """Register a class under ``name`` on ``axis``; ``gives`` and ``wants`` are words of WORDS."""
    unknown = [w for w in (*gives, *wants) if w not in WORDS]
    if axis not in AXES or unknown:
        raise ValueError(f"method {name!r}: axis {axis!r} or words {unknown} are not in the closed lists")

    def register(cls: type) -> type:
        known = _methods.get(name)
        if known is not None and known.cls.__module__ != cls.__module__:
            raise ValueError(f"method {name!r} is registered twice: {known.cls.__module__} and {cls.__module__}")
        cls.name = name
        _methods[name] = Method(name, axis, cls, paper, system, tuple(gives), tuple(wants), defaults)
        _systems.update(dict.fromkeys(aliases, name))
        return cls

    return register


def system(name: str, recipe: str) -> None:
    """Name a sum of methods: ``system("adalora", "lora+adalora-start+adalora-ranks")``."""
    _systems[name] = recipe


def systems() -> dict[str, str]:
    """The named sums."""
    _walk()
    return dict(_systems)


def methods(axis: str | None = None) -> list[Method]:
    """Every registered method, sorted by axis and name; ``axis`` keeps one axis."""
    _walk()
    found = [m for m in _methods.values() if axis in (None, m.axis)]
    return sorted(found, key=lambda m: (AXES.index(m.axis), m.name))


def find(name: str) -> Method:
    """The method called ``name``; raises UserError with the nearest name."""
    _walk()
    if name not in _methods:
        raise UserError(
            f"there is no method {name!r}{nearest(name, [*_methods, *_systems])}; `veneer methods` lists all"
        )
    return _methods[name]


def _walk() -> None:
    if _walked:
        return
    _walked.append(True)
    for folder in FOLDERS:
        package = importlib.import_module(f"veneer.{folder}")
        for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda i: i.name):
            importlib.import_module(f"veneer.{folder}.{info.name}")
