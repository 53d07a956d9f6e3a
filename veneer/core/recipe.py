"""A recipe: a sum of method names, parsed, completed and checked."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from typing import Any

from veneer.core import registry
from veneer.core.registry import SINGLE, WORDS, Method
from veneer.errors import UserError
from veneer.fields import fields_of


@dataclass(frozen=True)
class Part:
    """One method of a recipe with the fields that were set."""

    method: Method
    fields: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v!r}" for k, v in sorted(self.fields.items()))
        return f"{self.method.name}({inner})" if inner else self.method.name


@dataclass(frozen=True)
class Recipe:
    """The parts of a recipe, complete: a delta or a side, at most one part on each of the single axes."""

    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()

    def part(self, axis: str) -> Part | None:
        """The part on a single axis, or None."""
        return next((p for p in self.parts if p.method.axis == axis), None)

    def on(self, axis: str) -> list[Part]:
        """All parts on an axis, in the order given."""
        return [p for p in self.parts if p.method.axis == axis]

    def __str__(self) -> str:
        return "+".join(str(p) for p in self.parts)


def parse(text: str | Recipe, **offered: Any) -> Recipe:
    """The recipe that ``text`` names, with ``rank``, ``alpha`` and ``dropout`` offered to each part that has them.

    Raises UserError for an unknown name or field, two parts on a single axis, or a want that nothing gives.
    """
    if isinstance(text, Recipe):
        return text
    given = [Part(registry.find(name), fields) for name, fields in _expand(text)]
    if not given:
        raise UserError("the recipe is empty; name a method, for example 'lora'")
    parts, notes = _complete(given)
    notes += _one_per_axis(parts)
    for p in parts:
        if p.method.axis in ("merge", "protocol"):
            where = "veneer.merge" if p.method.axis == "merge" else "fit(protocol=…)"
            raise UserError(f"{p.method.name} is a {p.method.axis} method: give it to {where}, not to a recipe")
    for key, value in offered.items():
        if value is not None and not any(key in fields_of(p.method.cls) for p in parts):
            raise UserError(f"{key}={value} was given, but nothing in {_sum(parts)} has a field {key!r}")
    parts = [_with_offer(p, offered) for p in parts]
    recipe = Recipe(tuple(sorted(parts, key=lambda p: registry.AXES.index(p.method.axis))), tuple(notes))
    _check_wants(recipe)
    return recipe


def _expand(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and keyword arguments of a sum, named sums written out."""
    alone = registry.systems().get(text.strip().lower())
    if alone is not None:
        return _expand(alone)
    out: list[tuple[str, dict[str, Any]]] = []
    for term in _split(text):
        match = re.fullmatch(r"\s*([\w.-]+)\s*(?:\((.*)\))?\s*", term, re.S)
        if not match:
            raise UserError(f"the recipe {text!r} has a part {term!r} that is not a name or name(field=value)")
        name, inner = match.group(1).lower(), match.group(2)
        fields = _arguments(name, inner or "")
        named = registry.systems().get(name)
        if named is None:
            out.append((name, fields))
            continue
        for part, own in _expand(named):
            known = fields_of(registry.find(part).cls)
            out.append((part, own | {k: v for k, v in fields.items() if k in known}))
        lost = [k for k in fields if not any(k in f for _, f in out)]
        if lost:
            raise UserError(f"{name} is the sum {named}; none of its parts has a field {lost[0]!r}")
    return out


def _split(text: str) -> list[str]:
    depth, start, terms = 0, 0, []
    for i, c in enumerate(text):
        depth += c in "([{"
        depth -= c in ")]}"
        if c == "+" and depth == 0:
            terms.append(text[start:i])
            start = i + 1
    return [*terms, text[start:]]


def _arguments(name: str, inner: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"f({inner})", mode="eval").body
        if call.args:
            raise ValueError
        return {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, TypeError):
        raise UserError(f"{name}({inner}): write fields as name=value, for example {name}(rank=8)") from None


def _complete(given: list[Part]) -> tuple[list[Part], list[str]]:
    """Add the parts that stand for axes left out: from the methods' defaults where these fit, then plain LoRA."""
    parts, notes = list(given), []
    for p in given:
        for name, fields in _expand(p.method.defaults) if p.method.defaults else []:
            m = registry.find(name)
            if any(q.method.axis == m.axis and (m.axis in SINGLE or q.method is m) for q in parts):
                continue
            if set(m.wants) <= {word for q in parts for word in q.method.gives}:
                parts.append(Part(m, fields))
            else:
                notes.append(f"{p.method.name} comes without {m.name}, which does not fit {_sum(given)}")
    if not any(p.method.axis in ("delta", "side") or getattr(p.method.cls, "standalone", False) for p in parts):
        parts.append(Part(registry.find("lora")))
    return parts, notes


def _sum(parts: list[Part]) -> str:
    return "+".join(p.method.name for p in parts)


def _one_per_axis(parts: list[Part]) -> list[str]:
    """Refuse two parts on a single axis; returns what is to be said of parts that share a task."""
    seen: list[Part] = []
    for p in parts:
        axis = p.method.axis
        twin = next((q for q in seen if q.method is p.method or (axis in SINGLE and q.method.axis == axis)), None)
        if twin is not None:
            raise UserError(
                f"a recipe holds at most one {axis} method; it names {twin.method.name} and {p.method.name}"
            )
        seen.append(p)
    ranks = next((p.method.name for p in parts if p.method.axis == "ranks"), None)
    planning = [p.method.name for p in parts if p.method.axis == "init" and hasattr(p.method.cls, "plan")]
    return [f"{ranks} decides the ranks; {name} gives the start only" for name in planning if ranks is not None]


def _with_offer(part: Part, offered: dict[str, Any]) -> Part:
    known = fields_of(part.method.cls)
    extra = {k: v for k, v in offered.items() if v is not None and k in known and k not in part.fields}
    return Part(part.method, part.method.cls.checked(extra | part.fields))


def _check_wants(recipe: Recipe) -> None:
    given = {word for p in recipe.parts for word in p.method.gives}
    for p in recipe.parts:
        p.method.cls.check_recipe(recipe)
        for word in p.method.wants:
            if word not in given:
                others = [m.name for m in registry.methods() if word in m.gives]
                raise UserError(
                    f"{p.method.name} wants {WORDS[word]} ({word!r}), which {recipe} does not give; "
                    f"these do: {', '.join(others) or 'none yet'}"
                )
