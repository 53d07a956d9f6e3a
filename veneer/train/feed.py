"""Where micro-batches come from: encoded rows, or batches that the user made."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.errors import UserError
from veneer.train.settings import Settings
from veneer.train.tasks import Task, rows_of, tokens_of

if TYPE_CHECKING:
    from veneer.data import Dataset


class Micro(NamedTuple):
    """One micro-batch of this process: its rows' numbers in the data, its units (0: no weight), its tokens."""

    batch: Any
    rows: list[int]
    units: int
    tokens: int


class RowFeed:
    """Encoded rows, cut into batches; the order is a function of seed and epoch alone.

    ``dataset`` is a ``veneer.data.Dataset``. Of each batch, process ``rank`` of ``world`` takes its share; an empty one
    takes part with any row and no unit.
    """

    def __init__(
        self,
        dataset: Dataset,
        task: Task,
        batch_size: int,
        *,
        seed: int = 0,
        by_length: bool = True,
        shuffle: bool = True,
        world: int = 1,
        rank: int = 0,
    ) -> None:
        from veneer.data import Batches

        self.dataset, self.task = dataset, task
        self.batches = Batches(
            dataset.lengths, batch_size, seed=seed, by_length=by_length, shuffle=shuffle, world=world, rank=rank
        )
        self.length: int | None = len(self.batches)
        self.fingerprint: str | None = dataset.fingerprint

    def epoch(self, number: int, skip: int = 0) -> Iterator[Micro]:
        """The micro-batches of one epoch, the first ``skip`` left out."""
        batches = self.batches.at(number)
        for k in range(skip, len(batches)):
            mine = batches[k]
            rows = mine or batches.whole(k)[:1]
            batch = self.dataset.batch(rows)
            yield Micro(batch, rows, self.task.units(batch) if mine else 0, tokens_of(batch) if mine else 0)

    def where(self, rows: Sequence[int]) -> str:
        """Where rows stand in the data, in words."""
        return some(self.dataset.where(rows))


class BatchFeed:
    """Batches that the user made, in the user's order; of each, process ``rank`` of ``world`` takes its rows.

    An iterator gives one epoch. Where the data draws from the global generators (a shuffling DataLoader), a resumed run
    sets these back to the epoch's start and passes over what was seen.
    """

    def __init__(self, data: Iterable[Any], task: Task, *, world: int = 1, rank: int = 0) -> None:
        self.data, self.task, self.world, self.rank = data, task, world, rank
        self.length: int | None = len(data) if isinstance(data, Sized) else None
        if self.length == 0:
            raise UserError("the data holds no batch; at least one was expected")
        self.once = isinstance(data, Iterator)
        self.fingerprint = fingerprint(data) if isinstance(data, Sequence) else None

    def epoch(self, number: int, skip: int = 0) -> Iterator[Micro]:
        """The micro-batches of one epoch; the first ``skip`` are drawn and dropped at once."""
        if self.once and number > 0:
            raise UserError("the data is an iterator, which ends after one epoch: give a list or a DataLoader")
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(number)
        stream = iter(self.data)
        seen = sum(rows_of(batch) for batch in itertools.islice(stream, skip))
        return self._shares(stream, seen)

    def _shares(self, stream: Iterator[Any], seen: int) -> Iterator[Micro]:
        for batch in stream:
            count = rows_of(batch)
            mine = list(range(self.rank, count, self.world))
            part = batch if self.world == 1 else taken(batch, mine or [0], count)
            rows = [seen + i for i in mine]
            yield Micro(part, rows, self.task.units(part) if mine else 0, tokens_of(part) if mine else 0)
            seen += count

    def where(self, rows: Sequence[int]) -> str:
        """The numbers of rows in the order the data gives them."""
        return "rows " + some([str(r) for r in rows])


def feed(
    data: Any,
    task: Task,
    settings: Settings,
    processor: Callable[[], Any],
    *,
    by_length: bool = True,
    shuffle: bool = True,
    world: int = 1,
    rank: int = 0,
    label_names: Sequence[str] | None = None,
) -> RowFeed | BatchFeed:
    """The feed of whatever ``fit`` was given: a path, rows, a datasets object, encoded rows, or batches.

    ``processor`` gives the tokenizer or image processor when rows have to be encoded.
    """
    from veneer.data import Dataset, prepare

    if not isinstance(data, Dataset):
        first = _first(data)
        if isinstance(data, torch.utils.data.Dataset) and not (isinstance(first, Mapping) and "input_ids" in first):
            raise UserError("the data is a torch Dataset, which does not say how rows are batched: give its DataLoader")
        if task.custom is not None or _is_batch(first) or (first is None and not _is_source(data)):
            return BatchFeed(data, task, world=world, rank=rank)
        if isinstance(first, Mapping) and "input_ids" in first:
            data = _encoded([data[i] for i in range(len(data))], task.name)
        else:
            size, template = settings.max_length, settings.template
            data = prepare(data, processor(), task.name, size, template, label_names=label_names)
    size = settings.batch_size if shuffle else settings.eval_batch_size or 2 * settings.batch_size
    return RowFeed(data, task, size, seed=settings.seed, by_length=by_length, shuffle=shuffle, world=world, rank=rank)


def _first(data: Any) -> Any:
    """The first item of a list, a datasets object or a torch Dataset; None of anything else."""
    indexed = isinstance(data, Sequence | torch.utils.data.Dataset) or hasattr(data, "features")
    known = indexed and isinstance(data, Sized) and not isinstance(data, str)
    return data[0] if known and len(data) else None


def _is_batch(first: Any) -> bool:
    """Whether a first item is a batch of tensors and not a row."""
    if not isinstance(first, Mapping):
        return isinstance(first, Tensor | tuple | list)
    return any(isinstance(v, Tensor) and v.ndim > (0 if k == "labels" else 1) for k, v in first.items())


def _is_source(data: Any) -> bool:
    """Whether the data is something that rows are read from: a path, a datasets object, a table; or an empty list."""
    return isinstance(data, str | os.PathLike | list | tuple) or hasattr(data, "features") or hasattr(data, "iloc")


def _encoded(rows: Sequence[Mapping[str, Any]], task: str) -> Dataset:
    """Rows that hold input_ids and labels already, as a Dataset."""
    from veneer.data import Collator, Dataset

    items = []
    for number, row in enumerate(rows):
        if "labels" not in row:
            raise UserError(f"data[{number}] holds input_ids and no labels; both were expected")
        items.append({k: v.tolist() if isinstance(v, Tensor) else v for k, v in row.items() if k != "attention_mask"})
        labels = items[-1]["labels"]
        if isinstance(labels, list) and task == "causal" and len(labels) != len(items[-1]["input_ids"]):
            raise UserError(
                f"data[{number}] holds {len(items[-1]['input_ids'])} input_ids and {len(labels)} labels; "
                f"equally many were expected"
            )
    count = len(items)
    longest = max(len(item["input_ids"]) for item in items)
    places = [f"data[{i}]" for i in range(count)]
    return Dataset(
        "data", task, items, list(range(count)), places, [False] * count, [], None, Collator(0), None, longest
    )


def some(names: Sequence[str], most: int = 12) -> str:
    """The names with commas, those beyond ``most`` as an ellipsis."""
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


def tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer the model was loaded with, or the one that lies beside its weights."""
    known = model.__dict__.get("veneer_tokenizer")
    if known is not None:
        return known
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    if path and Path(path).is_dir():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    raise UserError("the rows have to be encoded and the model came without a tokenizer: give fit tokenizer=")


def taken(batch: Any, rows: list[int], count: int) -> Any:
    """The given rows of every tensor of a batch that has ``count`` rows."""
    if isinstance(batch, Tensor):
        return batch[rows] if batch.ndim and batch.shape[0] == count else batch
    if isinstance(batch, Mapping):
        return {k: taken(v, rows, count) for k, v in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(taken(v, rows, count) for v in batch)
    return batch


def fingerprint(examples: Iterable[Any]) -> str:
    """A hash of the content of examples or batches, in order: what a resumed run must find again."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            # not contiguous(): it leaves a single element its stride, which view does not take
            plain = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                digest.update(f"{key}:".encode())
                add(inner)
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Tensor | Mapping | list | tuple):
            for inner in value:
                add(inner)
        else:
            digest.update(repr(value).encode())
        digest.update(b";")

    for example in examples:
        add(example)
    return digest.hexdigest()[:32]
