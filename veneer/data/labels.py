"""Class names and their numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from veneer.data.read import kind_of, some
from veneer.errors import UserError, nearest


class LabelNames(list[str]):
    """The names of the classes, in the order of their numbers."""

    @classmethod
    def gather(cls, values: Iterable[tuple[Any, str]], names: Sequence[str] | None = None) -> LabelNames:
        """Names given, or those that occur: in order of size where all are whole numbers, else alphabetically.

        Args:
            values: (label, where it stands) of every row.
            names: the training data's names, or those that the source declares.
        """
        if names is not None:
            if len(set(names)) != len(names) or len(names) < 2:
                raise UserError(f"the label names are {some(names) or 'none'}; expected at least two different names")
            return cls(str(name) for name in names)
        found = {name_of(value, where) for value, where in values}
        if len(found) < 2:
            raise UserError(f'every row has the label "{found.pop()}"; expected at least two different labels')
        whole = all(name.lstrip("-").isdecimal() for name in found)
        return cls(sorted(found, key=int if whole else None))

    def number(self, value: Any, where: str) -> int:
        """The class number of a label: a name, or a number where the names are not numbers themselves."""
        name = name_of(value, where)
        if name in self:
            return self.index(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(self):
            return value
        raise UserError(
            f'{where}: the label "{name}" is not one of the {len(self)} known ({some(self)}){nearest(name, self)}'
        )


def name_of(value: Any, where: str) -> str:
    """A label as a name; 1, 1.0 and "1" are the same one."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float) or value == "" or value != value:
        found = "an empty text" if value == "" else "not a number" if value != value else kind_of(value)
        raise UserError(f"{where}: the label is {found}; expected a name or a number")
    return str(value)
