"""Hyper-parameters as annotated class attributes, checked by name, type and range."""

from __future__ import annotations

import inspect
import sys
import types
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from veneer.errors import UserError, nearest


@dataclass(frozen=True)
class At:
    """Bounds, unit and one line of explanation of a field: ``Annotated[int, At(ge=1, doc="rank")]``."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    doc: str = ""
    unit: str = ""

    def violated(self, value: Any) -> str:
        """The first bound that ``value`` breaks, in words, or an empty string."""
        for bound, word, ok in (
            (self.ge, "at least", lambda v, b: v >= b),
            (self.gt, "greater than", lambda v, b: v > b),
            (self.le, "at most", lambda v, b: v <= b),
            (self.lt, "less than", lambda v, b: v < b),
        ):
            if bound is not None and not ok(value, bound):
                return f"{word} {bound:g}"
        return ""


@dataclass(frozen=True)
class Field:
    """One hyper-parameter of a method: name, type, default and bounds."""

    name: str
    hint: Any
    default: Any
    at: At


class Fields:
    """A class whose annotated attributes with a default are its hyper-parameters."""

    name: ClassVar[str] = ""

    def set_fields(self, given: dict[str, Any]) -> None:
        """Check ``given`` and set every field on the instance, the others to their default."""
        checked = type(self).checked(given)
        for field in fields_of(type(self)).values():
            setattr(self, field.name, checked.get(field.name, field.default))

    def field_values(self) -> dict[str, Any]:
        """The fields of this instance, by name."""
        return {name: getattr(self, name) for name in fields_of(type(self))}

    @classmethod
    def check_recipe(cls, recipe: Any) -> None:
        """Raise UserError where the method cannot work in ``recipe``, as far as the sum alone tells."""

    @classmethod
    def checked(cls, given: dict[str, Any]) -> dict[str, Any]:
        """``given`` with its values converted; raises UserError for an unknown name, a wrong type or range."""
        known = fields_of(cls)
        out = {}
        for name, value in given.items():
            if name not in known:
                raise UserError(
                    f"{cls.name or cls.__name__} has no field {name!r}{nearest(name, known)} "
                    f"(it has: {', '.join(known) or 'none'})"
                )
            out[name] = _convert(known[name], value, cls.name or cls.__name__)
        return out


@cache
def fields_of(cls: type) -> dict[str, Field]:
    """The fields of a Fields class: its ``Annotated`` attributes that have a default, base classes first."""
    found: dict[str, Field] = {}
    for owner in reversed([c for c in cls.__mro__ if issubclass(c, Fields)]):
        for name, hint in inspect.get_annotations(owner).items():
            if isinstance(hint, str) and hint.startswith("Annotated["):
                hint = eval(hint, vars(sys.modules[owner.__module__]))
            if get_origin(hint) is Annotated and hasattr(cls, name):
                kind, *notes = get_args(hint)
                at = next((a for a in notes if isinstance(a, At)), At())
                found[name] = Field(name, kind, getattr(cls, name), at)
    return found


def _convert(field: Field, value: Any, owner: str) -> Any:
    try:
        value = _typed(field.hint, value)
    except TypeError:
        raise UserError(f"{owner}: {field.name}={value!r} is not {_words(field.hint)}") from None
    broken = field.at.violated(value) if isinstance(value, int | float) and not isinstance(value, bool) else ""
    if broken:
        raise UserError(f"{owner}: {field.name}={value!r} must be {broken}")
    return value


def _typed(hint: Any, value: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for option in sorted(args, key=lambda a: a is float):
            try:
                return _typed(option, value)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        if value in args:
            return value
        raise TypeError
    if origin in (tuple, list):
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise TypeError
        kind = args[0] if args else Any
        return origin(_typed(kind, v) for v in value)
    if hint in (None, type(None)):
        if value is None:
            return None
        raise TypeError
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    wanted = origin or hint
    if isinstance(value, wanted) and not (isinstance(value, bool) and wanted is int):
        return value
    raise TypeError


def _words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(a) for a in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_words(a) for a in get_args(hint))
    names = {int: "a whole number", float: "a number", str: "text", bool: "True or False", type(None): "None"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
