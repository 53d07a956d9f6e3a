"""Columns by the names that Veneer knows, and what they must hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.data.read import Rows, kind_of, some
from veneer.errors import UserError, nearest

KNOWN = (
    "messages", "conversations", "tools", "system", "prompt", "completion", "instruction", "input", "output",
    "text", "text2", "premise", "hypothesis", "sentence1", "sentence2", "label", "tokens", "tags", "image",
)  # fmt: skip


def renamed(rows: Rows, columns: Mapping[str, str] | None) -> Rows:
    """The rows under Veneer's names: ``columns={"prompt": "question"}`` makes the column question the prompt."""
    if not columns:
        return rows
    for ours, theirs in columns.items():
        if ours not in KNOWN:
            raise UserError(f'columns names "{ours}"; expected one of {", ".join(KNOWN)}{nearest(ours, KNOWN)}')
        if theirs not in rows[0]:
            raise UserError(
                f'columns gives "{theirs}" for {ours}, which {rows.where(0)} does not have; '
                f"found: {some(rows[0])}{nearest(theirs, rows[0])}"
            )
    taken = set(columns.values())
    result = Rows([], rows.name, rows.places)
    for row in rows:
        kept = {name: value for name, value in row.items() if name not in taken}
        result.append(kept | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row})
    theirs_to_ours = {theirs: ours for ours, theirs in columns.items()}
    result.label_names = {theirs_to_ours.get(name, name): names for name, names in rows.label_names.items()}
    return result


def value_of(rows: Rows, index: int, column: str) -> Any:
    """The value of a column that must be there and must not be null."""
    row = rows[index]
    if column not in row:
        raise UserError(
            f'{rows.where(index)}: there is no column "{column}", which the first row has; found: {some(row) or "none"}'
        )
    if row[column] is None:
        raise UserError(f'{rows.where(index)}: column "{column}" is null; expected a value')
    return row[column]


def text_of(rows: Rows, index: int, column: str) -> str:
    """The text in a column that must hold text."""
    value = value_of(rows, index, column)
    if not isinstance(value, str):
        raise UserError(f'{rows.where(index)}: column "{column}" holds {kind_of(value)}; expected a text')
    return value
