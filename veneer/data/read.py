"""Rows out of files and Python objects, each remembering where it came from.

Every source becomes a list of dicts. A broken source raises one sentence that names the file, the line, what was
found and what was expected; nothing is guessed and nothing is skipped except blank lines.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from veneer.errors import UserError, nearest

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
EXPECTED = ".jsonl, .json, .csv, .tsv, .parquet or .txt, a folder of images, a list of dicts or a datasets object"


class Rows(list[dict[str, Any]]):
    """A list of rows that can say where each one stands.

    Attributes:
        name: file or folder name, or "data" for Python objects.
        places: "line 17" for every row of a file; None for Python objects.
        label_names: class names by column, where the source declares them (datasets' ClassLabel).
    """

    def __init__(self, rows: Iterable[dict[str, Any]], name: str = "data", places: list[str] | None = None) -> None:
        super().__init__(rows)
        self.name = name
        self.label_names: dict[str, list[str]] = {}
        self.places = places

    def where(self, index: int) -> str:
        """``"train.jsonl, line 17"`` for files, ``"data[3]"`` for Python objects."""
        return f"{self.name}[{index}]" if self.places is None else f"{self.name}, {self.places[index]}"


def read_rows(source: Any, limit: int | None = None) -> Rows:
    """All rows of ``source``, or the first ``limit`` of them.

    Args:
        source: path of a .jsonl, .json (a list of objects, or one object a line), .csv, .tsv, .parquet or .txt file
            (one row a line, column ``text``), of a folder with one sub-folder of images per class (columns ``image``,
            ``label``), an iterable of dicts, a ``datasets.Dataset`` or a ``pandas.DataFrame``.
        limit: stop after so many rows; what follows is not read and so not checked (Python ≥ 1).

    Raises:
        UserError: the source is missing, empty, broken, of another kind, or a pickle.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; expected at least 1 row")
    if isinstance(source, str | Path):
        rows = _from_path(Path(source), limit)
    else:
        rows = _from_object(source, limit)
    if not rows:
        raise UserError(f"{rows.name} holds no rows; expected at least one")
    return rows


def _from_path(path: Path, limit: int | None) -> Rows:
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise UserError(f"{path} is a pickle, which can run code when it is opened; expected {EXPECTED}")
    if not path.exists():
        raise UserError(_missing(path))
    if path.is_dir():
        return _from_folder(path, limit)
    readers = {
        ".jsonl": _from_lines, ".ndjson": _from_lines, ".json": _from_json, ".csv": _from_csv, ".tsv": _from_csv,
        ".parquet": _from_parquet, ".txt": _from_text,
    }  # fmt: skip
    if suffix not in readers:
        raise UserError(f'{path} is of a kind that is not read ("{suffix}"); expected {EXPECTED}')
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty; expected at least one row")
        return readers[suffix](path, limit)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f'there is no folder "{path.parent}" to read {path.name} from; hub data sets are loaded with ' \
               "datasets.load_dataset and given as an object"  # fmt: skip
    return f'there is no file "{path}"{nearest(path.name, (p.name for p in path.parent.iterdir()))}'


def decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    """``(line number from 1, text with its line end)`` of a UTF-8 file, or a sentence naming the line that is not."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise UserError(f"{path} is written in UTF-16; expected UTF-8, save it again in that encoding")
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: byte 0x{line[error.start]:02x} at position {error.start + 1} is not "
                    "UTF-8; save the file as UTF-8 text"
                ) from error
            if "\0" in text:
                raise UserError(f"{path}, line {number}: holds a zero byte, so it is not text; expected UTF-8 text")
            yield number, text


def _from_text(path: Path, limit: int | None) -> Rows:
    kept = ((number, line.rstrip("\r\n")) for number, line in decoded_lines(path) if line.strip())
    pairs = list(islice(kept, limit))
    return Rows(({"text": line} for _, line in pairs), str(path), [f"line {number}" for number, _ in pairs])


def _from_lines(path: Path, limit: int | None) -> Rows:
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    for number, line in decoded_lines(path):
        if limit is not None and len(rows) == limit:
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            if number == 1 and line.lstrip().startswith("["):
                raise UserError(f"{path}, line 1: a JSON list; expected one object a line, or name it .json") from error
            why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep"
            raise UserError(
                f"{path}, line {number}: broken JSON ({why}): {_short(line)}; expected one whole object a line"
            ) from error
        rows.append(_object(row, f"{path}, line {number}"))
        places.append(f"line {number}")
    return Rows(rows, str(path), places)


def _from_json(path: Path, limit: int | None) -> Rows:
    text = "".join(line for _, line in decoded_lines(path))
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise UserError(f"{path}: broken JSON (nested too deep); expected a list of objects") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):  # several objects: one a line, under this name
            return _from_lines(path, limit)
        raise UserError(
            f"{path}, line {error.lineno}: broken JSON ({error.msg} at column {error.colno}); "
            "expected a list of objects"
        ) from error
    if isinstance(content, dict) and text.strip().count("\n") == 0:
        content = [content]
    if not isinstance(content, list):
        found = f"one object with {some(content)}" if isinstance(content, dict) else kind_of(content)
        raise UserError(f"{path}: holds {found}; expected a list of objects, one for each row")
    rows = [_object(row, f"{path}, row {number}") for number, row in enumerate(content[:limit], 1)]
    return Rows(rows, str(path), [f"row {number}" for number in range(1, len(rows) + 1)])


def _from_csv(path: Path, limit: int | None) -> Rows:
    before = csv.field_size_limit(sys.maxsize)  # the module's own bound of 128 KiB is less than one long document
    try:
        return _parse_csv(path, limit)
    finally:
        csv.field_size_limit(before)


def _parse_csv(path: Path, limit: int | None) -> Rows:
    first = next(line for _, line in decoded_lines(path))
    separator = next((mark for mark in ",\t;" if mark in first), ",")
    reader = csv.reader((line for _, line in decoded_lines(path)), delimiter=separator, strict=True)
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    header, start = None, 1
    try:
        for fields in reader:
            start, line = reader.line_num + 1, start
            if not fields:
                continue
            if header is None:
                header = _header(path, fields)
            elif len(fields) != len(header):
                raise UserError(
                    f"{path}, line {line}: {len(fields)} fields; expected {len(header)} ({', '.join(header)}); "
                    "put a field that holds the separator in double quotes"
                )
            elif limit is None or len(rows) < limit:
                rows.append(dict(zip(header, fields)))
                places.append(f"line {line}")
            else:
                break
    except csv.Error as error:
        raise UserError(f"{path}, line {start}: broken CSV ({error}); check the double quotes from there on") from error
    if header is not None and not rows:
        raise UserError(f"{path} holds a header ({', '.join(header)}) and no rows; expected at least one")
    return Rows(rows, str(path), places)


def _header(path: Path, fields: list[str]) -> list[str]:
    header = [field.strip() for field in fields]
    if "" in header:
        raise UserError(f"{path}, line 1: column {header.index('') + 1} has no name; expected a header of column names")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise UserError(f'{path}, line 1: column "{twice}" appears twice; expected each name once')
    return header


def _from_parquet(path: Path, limit: int | None) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow, which is not installed: pip install 'veneer[parquet]'") from error
    rows: list[dict[str, Any]] = []
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                rows.extend(batch.to_pylist())
                if limit is not None and len(rows) >= limit:
                    break
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a whole Parquet file ({str(error).splitlines()[0]})") from error
    rows = rows[:limit]
    return Rows(rows, str(path), [f"row {number}" for number in range(1, len(rows) + 1)])


def _from_folder(folder: Path, limit: int | None) -> Rows:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    classes = [entry for entry in entries if entry.is_dir()]
    paths = [path for entry in classes for path in sorted(entry.iterdir()) if path.suffix.lower() in IMAGES]
    if not paths:
        loose = [entry.name for entry in entries if entry.suffix.lower() in IMAGES]
        deeper = next((entry for entry in classes if any(inner.is_dir() for inner in entry.iterdir())), None)
        if loose:
            found = f"holds images of no class ({loose[0]} …)"
        elif deeper is not None:
            found = f"holds folders of folders; give one of them, such as {deeper}"
        elif entries:
            found = f"holds no images but {some(entry.name for entry in entries)}"
        else:
            found = "is an empty folder"
        raise UserError(f"{folder} {found}; expected a data file, or a folder with one sub-folder of images per class")
    rows = [{"image": str(path), "label": path.parent.name} for path in paths[:limit]]
    return Rows(rows, str(folder), [f"{path.parent.name}/{path.name}" for path in paths[:limit]])


def _from_object(source: Any, limit: int | None) -> Rows:
    if isinstance(source, Rows):
        return source if limit is None else _head(source, limit)
    if hasattr(source, "to_dict") and hasattr(source, "iloc"):  # pandas.DataFrame
        return _from_frame(source.iloc[:limit])
    if isinstance(source, Mapping):
        parts = some(source)
        raise UserError(f"the data is a {type(source).__name__} with {parts}; expected one list of rows; give one part")
    if isinstance(source, bytes) or not isinstance(source, Iterable):
        raise UserError(f"the data is {kind_of(source)}; expected {EXPECTED}")
    rows = Rows(_object(row, f"data[{index}]") for index, row in enumerate(islice(source, limit)))
    for column, feature in (getattr(source, "features", None) or {}).items():  # datasets.Dataset
        feature = getattr(feature, "feature", feature)
        if getattr(feature, "names", None):
            rows.label_names[column] = list(feature.names)
    return rows


def _from_frame(frame: Any) -> Rows:
    """Rows of a pandas frame, with null for its missing values and lists for the arrays that Parquet lists become."""
    cells = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return Rows({k: list(v) if getattr(v, "ndim", 0) == 1 else v for k, v in row.items()} for row in cells)


def _head(rows: Rows, limit: int) -> Rows:
    head = Rows(rows[:limit], rows.name, rows.places and rows.places[:limit])
    head.label_names = rows.label_names
    return head


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise UserError(f'{where}: {kind_of(row)}; expected an object with named columns, such as {{"text": …}}')
    return dict(row)


def kind_of(value: Any) -> str:
    """What a value is, in the words of a person: "a list", "a text", "null"."""
    plain = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number",
             float: "a number", type(None): "null", bytes: "bytes"}  # fmt: skip
    return plain.get(type(value), f"a {type(value).__name__}")


def some(names: Iterable[Any], most: int = 6) -> str:
    """The first few of many names: "a, b, c …"."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


def _short(text: str, most: int = 60) -> str:
    text = text.strip()
    return text if len(text) <= most else text[:most] + "…"
