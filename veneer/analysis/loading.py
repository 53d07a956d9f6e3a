"""A model whose form fits the data: the task and the number of classes are read off the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import UserError

if TYPE_CHECKING:
    from veneer.data import Dataset, Rows

_PEFT = {"SEQ_CLS": "classification", "TOKEN_CLS": "token-classification", "SEQ_2_SEQ_LM": "seq2seq"}


def model_and_examples(
    name: str,
    rows: Rows,
    *,
    task: str | None = None,
    template: str | None = None,
    max_length: int | None = None,
    seed: int = 0,
    head: bool = True,
    adapter: str | None = None,
    **given: Any,
) -> tuple[Any, Dataset]:
    """The model and the rows as its examples.

    With ``head`` a model for classes gets a head for those that ``rows`` hold, which starts from ``seed``; for those of
    ``adapter``, a saved one, where it names them. ``given`` is for ``veneer.load_model``.
    """
    import torch

    import veneer
    from veneer.data import prepare
    from veneer.data.tasks import detect

    purpose = {} if adapter is None else purpose_of(adapter)
    task = task or purpose.get("task") or detect(rows)
    labels = purpose.get("labels") if purpose.get("task") == task else None
    torch.manual_seed(seed)
    model, processor = veneer.load_model(name, task=task, **given)
    if processor is None:
        raise UserError(f"{name} holds no tokenizer; put the tokenizer's files beside the model's weights")
    dataset = prepare(rows, processor, task=task, template=template, max_length=max_length, label_names=labels)
    names = dataset.label_names
    if head and names is not None:  # only now is it known how many classes there are
        torch.manual_seed(seed)
        model, _ = veneer.load_model(name, task=task, **classes(names), **given)
    return model, dataset


def classes(names: Sequence[str]) -> dict[str, Any]:
    """What ``veneer.load_model`` is told for a head of classes of these names."""
    numbers = {label: number for number, label in enumerate(names)}
    return {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": numbers}


def purpose_of(adapter: str | Path) -> dict[str, Any]:
    """``task``, ``labels`` and ``head`` (for ``veneer.load_model``) of a saved adapter, as far as its folder says.

    PEFT's name no labels. A folder that cannot be read says nothing here: whoever loads it is told what is wrong.
    """
    from veneer.io.files import read_json, read_tensors

    folder = Path(adapter)
    try:
        if (folder / "recipe.json").is_file():
            said = {k: v for k, v in read_json(folder / "recipe.json").items() if k in ("task", "labels")}
            return said | ({"head": classes(said["labels"])} if "labels" in said else {})
        task = _PEFT.get(read_json(folder / "adapter_config.json").get("task_type"))
        if task is None or task == "seq2seq":
            return {} if task is None else {"task": task}
        tensors = read_tensors(folder / "adapter_model.safetensors")
    except UserError:
        return {}
    counts = {len(v) for k, v in tensors.items() if k.endswith(("classifier.weight", "score.weight")) and v.ndim == 2}
    if len(counts) != 1:
        return {"task": task}
    (count,) = counts
    if count == 1 and task == "classification":
        return {"task": "regression"}
    return {"task": task, "head": {"num_labels": count}}


def row_scorer(model: Any, processor: Any, path: str, most: int = 128) -> Callable[[], float]:
    """A function that gives the model's loss on the first rows of a file, as the model then is."""
    from veneer.data import prepare, read_rows
    from veneer.train.evaluate import scores
    from veneer.train.feed import RowFeed
    from veneer.train.processes import Processes
    from veneer.train.tasks import Task, task_of

    task = task_of(model, None)
    what = Task(task)
    feed = RowFeed(prepare(read_rows(path, most), processor, task=task), what, 8, shuffle=False)
    return lambda: float(scores(model, feed, what, Processes(), model.dtype)["loss"])
