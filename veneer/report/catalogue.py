"""The page of methods, written from the registry: ``python -m veneer.report.catalogue docs/methods.md``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TITLES = {
    "delta": "Deltas: the form of the change",
    "init": "Inits: where it starts",
    "ranks": "Ranks: how much capacity, where and when",
    "optim": "Optim: how a gradient becomes a step",
    "objective": "Objectives: what is added to the loss",
    "base": "Bases: how the frozen weight is stored",
    "side": "Sides: what learns beside the base",
    "mixture": "Mixtures: several adapters at once",
    "merge": "Merging: several adapters become one",
    "protocol": "Protocols: who holds the data, in what order it comes",
}


FORMS = ("delta", "side", "mixture")
MEMORY = {
    "thin": "gradients and optimiser state of the added numbers alone",
    "dense": "gradients as large as the adapted weights",
    "replaced": "stands for W, which may be dropped",
    "quantised": "the frozen weights in fewer bits",
    "side": "no activation of the base is kept for a backward pass",
}
EXPORTS = ("peft", "peft-lora", "gguf", "merged")


def page(methods: Iterable[Any]) -> str:
    """Markdown with one section an axis and one entry a method: name, paper, wants, fields, docstring."""
    found = list(methods)
    parts = ["# Methods", "", "Made from the registry by `make docs`; a recipe is a sum of these names.", ""]
    for axis, title in TITLES.items():
        members = [m for m in found if m.axis == axis]
        if not members:
            continue
        parts += [f"## {title}", ""]
        for method in members:
            parts += _entry(method)
    return "\n".join(parts).rstrip() + "\n"


def fields(method: Any) -> list[tuple[str, str, str]]:
    """(name, default, explanation with bounds) of each hyper-parameter of a method."""
    from veneer.fields import fields_of

    rows = []
    for field in fields_of(method.cls).values():
        at = field.at
        bounds = [
            f"{sign} {value:g}"
            for sign, value in (("≥", at.ge), (">", at.gt), ("≤", at.le), ("<", at.lt))
            if value is not None
        ]
        words = [w for w in (at.doc, at.unit, ", ".join(bounds)) if w]
        rows.append((field.name, repr(field.default), "; ".join(words)))
    return rows


def parameters(method: Any) -> str:
    """The formula of the parameters per site: the first line that the method's own count is documented with."""
    owner = next((c for c in method.cls.__mro__ if "parameter_count" in vars(c)), None)
    if owner is None or owner.__module__.startswith("veneer.core."):  # the core's own says how to count, not what
        return ""
    return (owner.parameter_count.__doc__ or "").strip().split("\n")[0].rstrip(".")


def folds(method: Any) -> bool:
    """Whether the method is a form whose change can be put into the weights."""
    return method.axis in FORMS and bool(getattr(method.cls, "folds", False))


def exactly_lora(method: Any) -> bool:
    """Whether the method is a form that is a plain pair."""
    from veneer.core.delta import Delta

    cls = method.cls
    if not issubclass(cls, Delta) or {"as_lora", "folds"} & set(cls.reasons):
        return False
    return cls.pair is not Delta.pair or cls.as_lora is not Delta.as_lora


def exports(method: Any) -> tuple[str, ...]:
    """The formats of ``export`` that take a form; ``peft-lora`` and ``gguf`` the nearest pair where it is none."""
    if method.axis not in FORMS:
        return ()
    kind = getattr(method.cls, "peft", None)
    own = exactly_lora(method) or (kind is not None and kind.write)
    return tuple(name for name in EXPORTS if (own if name == "peft" else folds(method)))


def memory(method: Any) -> str:
    """The class of memory that a method makes, a key of MEMORY; empty where its form decides."""
    if method.axis == "base":
        return "quantised" if "quant" in method.cls.__module__ + (method.cls.__doc__ or "").lower() else ""
    if method.axis == "side":
        return "side"
    if "dense-gradient" in (*method.gives, *method.wants):
        return "dense"
    if method.axis not in FORMS:
        return ""
    return "replaced" if method.cls.replaces else "thin"


def selected(
    methods: Iterable[Any],
    *,
    foldable: bool | None = None,
    exportable: str | None = None,
    layer: str | None = None,
    memory_class: str | None = None,
) -> list[Any]:
    """The methods that answer to every filter given; all but ``memory_class`` leave forms alone."""
    found = list(methods)
    if foldable is not None:
        found = [m for m in found if m.axis in FORMS and folds(m) == foldable]
    if exportable is not None:
        found = [m for m in found if exportable in exports(m)]
    if layer is not None:
        found = [m for m in found if m.axis in FORMS and layer in m.cls.layers]
    if memory_class is not None:
        found = [m for m in found if memory(m) == memory_class]
    return found


def carried(method: Any) -> list[str]:
    """The sentences about where a form goes, what it lies on, and what memory it takes."""
    lines = []
    if method.axis in FORMS:
        kind = getattr(method.cls, "peft", None)
        words = [kind.type + (" of PEFT" if kind.write else " of PEFT (read only)")] if kind is not None else []
        plain = "plain LoRA" if exactly_lora(method) else "plain LoRA to a rank or tolerance" if folds(method) else ""
        words += [w for w in (plain, "merged" if folds(method) else "") if w]
        lines.append("layers: " + ", ".join(method.cls.layers))
        lines += ["folds: yes"] if folds(method) else []
        lines.append("exports as: " + (", ".join(words) or "nothing; it is saved in Veneer's own format"))
    if memory(method):
        lines.append(f"memory: {memory(method)}, {MEMORY[memory(method)]}")
    return lines


def declared(method: Any) -> list[str]:
    """The sentences a method prints about itself: paper, what it gives and wants, each "no" with its reason."""
    lines = []
    if method.paper:
        lines.append(f"paper: {method.paper}")
    if parameters(method):
        lines.append(f"parameters per site: {parameters(method)}")
    if method.gives:
        lines.append("gives: " + ", ".join(method.gives))
    if method.wants:
        lines.append("wants: " + ", ".join(method.wants))
    if method.defaults:
        lines.append(f"fills absent axes with: {method.defaults}")
    lines += [f"{name}: no, {why}" for name, why in (getattr(method.cls, "reasons", None) or {}).items()]
    return lines


def _entry(method: Any) -> list[str]:
    lines = [f"### `{method.name}`", "", *(f"- {line}" for line in declared(method)), ""]
    rows = fields(method)
    if rows:
        lines += ["| field | default | meaning |", "| --- | --- | --- |"]
        cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        lines += [f"| `{name}` | `{default}` | {words} |" for name, default, words in cells] + [""]
    text = inspect.cleandoc(method.cls.__doc__ or "")
    return [*lines, "```text", text, "```", ""] if text else lines


def main(argv: list[str]) -> int:
    """Write the page to the path in ``argv``."""
    from veneer.core import registry

    if len(argv) != 1:
        print("usage: python -m veneer.report.catalogue PATH", file=sys.stderr)
        return 2
    path = Path(argv[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(registry.methods()), encoding="utf-8")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
