"""The folder of a run: who may write to it, its checkpoints, its log and its record."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from pathlib import Path
from typing import IO, Any

from veneer.errors import UserError
from veneer.io import files

RECORD, LOG, LOCK = "run.json", "run.jsonl", "run.lock"
_STEP = re.compile(r"checkpoint-(\d+)")


class RunFolder:
    """``out``: ``adapter/``, ``checkpoint-STEP/``, ``run.jsonl``, ``run.json``, ``curves.png`` of one run.

    Opening takes the folder for this process until ``close``. Raises UserError when another process writes to it, or
    when it holds a run and ``resume`` is not given.
    """

    def __init__(self, path: str | os.PathLike[str], resume: bool) -> None:
        self.path = Path(path)
        self._log: IO[str] | None = None
        self._made = not self.path.exists()
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"out={self.path} is a file; give the name of a folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._take()
        except OSError as error:
            raise UserError(f"out={self.path} cannot be written: {error.strerror}; give another folder") from error
        if not resume and self.holds_run():
            self.close()
            raise UserError(
                f"{self.path} holds a run already{self._reached()}: give resume to go on with it, "
                f"or another out folder for a new one"
            )
        files.sweep(self.path)

    def _take(self) -> IO[str]:
        """Hold an flock on run.lock: the system lets go of it when this process dies, however it dies."""
        import fcntl

        file = open(self.path / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (held as long as the run)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise UserError(
                f"{self.path} is being written to by {owner}: wait for it, stop it, or give another out folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        return file

    def close(self) -> None:
        """Let go of the folder; one that was made for this run and got nothing is taken away again."""
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._made and self.path.is_dir() and [p.name for p in self.path.iterdir()] == [LOCK]:
            (self.path / LOCK).unlink()
            self.path.rmdir()
        self._lock.close()

    def holds_run(self) -> bool:
        """Whether anything of a run is here."""
        return any((self.path / n).exists() for n in (RECORD, LOG, "adapter")) or bool(self.checkpoints())

    def _reached(self) -> str:
        record = self.record() or {}
        if record.get("finished"):
            return f" (finished after {record.get('steps')} steps)"
        last = self.checkpoints()
        return f" (last checkpoint: {last[0].name})" if last else " (without a checkpoint)"

    def checkpoints(self) -> list[Path]:
        """The checkpoint folders, newest first, whole or not."""
        numbered = [(int(m.group(1)), p) for p in self.path.glob("checkpoint-*") if (m := _STEP.fullmatch(p.name))]
        return [p for _, p in sorted(numbered, reverse=True)]

    def remove(self, checkpoint: Path) -> None:
        """Take a checkpoint away: under another name first, so that a kill never leaves half of one under its own."""
        aside = checkpoint.with_name(f".{checkpoint.name}{files.PARTIAL}")
        os.rename(checkpoint, aside)
        files.sweep(self.path)

    def record(self) -> dict[str, Any] | None:
        """run.json, or None when it is missing or unreadable."""
        return record_at(self.path)

    def write_record(self, record: dict[str, Any]) -> None:
        """Replace run.json."""
        text = json.dumps(record, indent=2, default=str) + "\n"
        files.write_whole(self.path / RECORD, lambda path: path.write_text(text, encoding="utf-8"))

    def log(self, **line: Any) -> None:
        """Append one line to run.jsonl."""
        try:
            if self._log is None:
                self._log = open(self.path / LOG, "a", encoding="utf-8")  # noqa: SIM115 (kept open between lines)
            self._log.write(json.dumps(line, default=float) + "\n")
            self._log.flush()
        except OSError as error:
            if self._log is not None:
                with contextlib.suppress(OSError):
                    self._log.close()
                self._log = None
            raise UserError(
                f"cannot write {self.path / LOG}: {error.strerror}; the checkpoints are whole: make room and resume"
            ) from error

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drop what run.jsonl says about steps after ``step``; gives what is left."""
        kept = [line for line in lines_at(self.path) if line.get("step", 0) <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        files.write_whole(self.path / LOG, lambda path: path.write_text(text, encoding="utf-8"))
        return kept


def record_at(path: Path) -> dict[str, Any] | None:
    """The record of the run in ``path``, or None when it is missing or unreadable."""
    try:
        return files.read_json(path / RECORD)
    except UserError:
        return None


def lines_at(path: Path) -> list[dict[str, Any]]:
    """The whole lines of the log of the run in ``path``; one that a crash cut short is left out."""
    try:
        text = (path / LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]
