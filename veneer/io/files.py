"""Files that are whole or not there at all, read with errors that a user can act on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from veneer.errors import UserError

PARTIAL = ".partial"  # ends the name of every scratch file and folder, so that a killed run's leavings can be found
PREVIOUS = ".previous"  # ends the name under which an old file waits while a set of files is being replaced
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@contextmanager
def staged(
    directory: str | Path, *, last: Iterable[str] = (), keep: Iterable[str] = (), replaces: Iterable[str] = ()
) -> Iterator[Path]:
    """Give a scratch folder whose files appear in ``directory`` when the block ends; on any failure none of them do.

    A new ``directory`` appears by one rename. In one that exists each file is renamed over its old version, those in
    ``last`` at the end; then old files that match a glob of ``replaces`` go, and whatever else is there stays. The old
    versions wait under their name + ``.previous`` until every file is in place, and come back when the disk refuses.
    A set that is killed half way lacks its ``last`` files, unless ``keep`` names files whose old versions its reader
    finds again under ``.previous``.
    Raises UserError when the disk refuses.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; a directory is written there: give another name or move the file away")
    exists = directory.is_dir()
    home = directory if exists else directory.absolute().parent
    scratch = home / f".{directory.absolute().name}.{os.getpid()}{PARTIAL}"
    try:
        with _refusals(directory):
            scratch.mkdir(parents=True)
            yield scratch
            files = sorted(p for p in scratch.rglob("*") if p.is_file())
            for path in files:
                _sync(path)
            _sync(scratch)
            if exists:
                _place(scratch, directory, files, set(last), set(keep), list(replaces))
            else:
                os.rename(scratch, directory)
            _sync(home)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _place(
    scratch: Path, directory: Path, files: list[Path], last: set[str], keep: set[str], replaces: list[str]
) -> None:
    names = sorted((p.relative_to(scratch) for p in files), key=lambda n: (str(n) in last, str(n)))
    old = {directory / n: _aside(directory / n) for n in names if (directory / n).exists()}
    try:
        for path, before in old.items():
            _put_aside(path, before)
        if not keep:  # killed from here on the set is incomplete, which readers say; never an old file beside a new one
            for name in last & {str(n) for n in names}:
                (directory / name).unlink(missing_ok=True)
        for name in names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(scratch / name, directory / name)
        _sync(directory)
    except OSError:
        _put_back(directory, names, old)
        raise
    for before in old.values():
        before.unlink(missing_ok=True)
    for stale in {p for pattern in replaces for p in directory.glob(pattern)} - {directory / n for n in names}:
        stale.unlink()


def _aside(path: Path) -> Path:
    return path.with_name(path.name + PREVIOUS)


def _put_aside(path: Path, before: Path) -> None:
    before.unlink(missing_ok=True)
    try:
        os.link(path, before)
    except OSError:  # a file system without links
        shutil.copy2(path, before)


def _put_back(directory: Path, names: Iterable[Path], old: Mapping[Path, Path]) -> None:
    """The old versions over whatever stands in their place; new files that had none go."""
    for name in names:
        path = directory / name
        if path not in old:
            path.unlink(missing_ok=True)
        elif old[path].exists():
            os.replace(old[path], path)
            old[path].unlink(missing_ok=True)  # two links to one file: replacing does nothing


def write_whole(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it over ``path``: never half of the new content."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a directory; a file is written there: give the file's name")
    scratch = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with _refusals(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(scratch)
            _sync(scratch)
            os.replace(scratch, path)
            _sync(path.parent)
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


def sweep(directory: str | Path) -> None:
    """Remove what killed writers left in ``directory``. Only for a folder that no other process is writing to."""
    for path in Path(directory).glob(f".*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def _refusals(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot write {target}: {reason}; what was there before is untouched: make room or choose another place"
        ) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, in the order given. Within ``staged`` or ``write_whole``."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; raises UserError with the line when it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing{_neighbours(path)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; a JSON object was expected") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: {error.msg}; the file is damaged or not JSON"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {_kind(content)}; a JSON object was expected")
    return content


_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def _kind(value: Any) -> str:
    return "null" if value is None else _NAMES.get(type(value), type(value).__name__)


def typed(content: Mapping[str, Any], field: str, kinds: tuple[type, ...], path: Path, default: Any = ...) -> Any:
    """``content[field]``, which must be one of ``kinds``; ``default`` when absent or null.

    Raises UserError naming file and field when it is missing without a default, or of another type.
    """
    value = content.get(field)
    if value is None:
        if default is ...:
            raise UserError(f"{path} has no field {field!r}; {' or '.join(_NAMES[k] for k in kinds)} was expected")
        return default
    ok = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    if not ok or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(_NAMES[k] for k in kinds)
        raise UserError(f"{path}: {field} is {_kind(value)} ({value!r}); {wanted} was expected")
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, none sharing memory with another. Within ``staged`` or ``write_whole``."""
    seen: set[int] = set()
    ready: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    save_file(ready, path, metadata=dict(metadata or {"format": "pt"}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises UserError saying what else the file is, or how far it goes."""
    if not path.is_file():
        raise UserError(f"{path} is missing{_neighbours(path)}")
    _header(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}; fetch or save it again") from None


def _header(path: Path) -> dict[str, Any]:
    """The checked header of a safetensors file: eight bytes of length, then JSON with every tensor's place."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        _refuse_others(path, head + file.read(120))
        length = int.from_bytes(head, "little")
        if size < 8 or length + 8 > size:
            if len(head) == 8 and length > 100_000_000:
                raise UserError(f"{path} is not a safetensors file (its header would have {length} bytes)")
            raise UserError(f"{path} is cut short: it has {size} bytes and its header alone needs {length + 8}")
        file.seek(8)
        raw = file.read(length)
    try:
        header = json.loads(raw)
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path} is not a safetensors file, or its header is damaged; fetch or save it again") from None
    wanted = 8 + length + max(ends, default=0)
    if size < wanted:
        raise UserError(f"{path} is cut short: it has {size} of {wanted} bytes; fetch or save it again")
    return header


def _refuse_others(path: Path, head: bytes) -> None:
    pickled = head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"))
    if head[8:9] != b"{" and (pickled or path.suffix in PICKLES):
        raise UserError(
            f"{path} is a pickle, which can run code when it is read, and is refused; "
            "save the adapter as safetensors (in PEFT: save_pretrained(…, safe_serialization=True))"
        )
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder")
    if head.startswith(b"GGUF"):
        raise UserError(f"{path} is a GGUF file; a safetensors file was expected")


def _neighbours(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f": there is no folder {folder}"
    there = sorted(p.name for p in folder.iterdir())
    pickle = next((n for n in there if n.endswith(PICKLES)), None)
    if pickle and path.suffix == ".safetensors":
        return (
            f", and {pickle} beside it is a pickle, which can run code when it is read, and is refused: "
            "save the adapter as safetensors (in PEFT: save_pretrained(…, safe_serialization=True))"
        )
    return f"; {folder} holds {', '.join(there[:8]) or 'nothing'}"


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values once both have the coarser of their types."""
    if a.shape != b.shape:
        return False
    coarse = min(a.dtype, b.dtype, key=lambda t: torch.finfo(t).bits if t.is_floating_point else 64)
    return torch.equal(a.to(coarse).cpu(), b.to(coarse).cpu())
