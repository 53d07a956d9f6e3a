"""A model whose form fits the data: the task and the number of classes are read off the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from veneer.errors import UserError

if TYPE_CHECKING:
    from veneer.data import Dataset, Rows


def model_and_examples(
    name: str,
    rows: Rows,
    *,
    task: str | None = None,
    template: str | None = None,
    max_length: int | None = None,
    seed: int = 0,
    head: bool = True,
    **given: Any,
) -> tuple[Any, Dataset]:
    """The model and the rows as its examples.

    With ``head`` a model for classes gets a head for those that ``rows`` hold, which starts from ``seed``. ``given`` is
    for ``veneer.load_model``.
    """
    import torch

    import veneer
    from veneer.data import prepare
    from veneer.data.tasks import detect

    task = task or detect(rows)
    torch.manual_seed(seed)
    model, processor = veneer.load_model(name, task=task, **given)
    if processor is None:
        raise UserError(f"{name} holds no tokenizer; put the tokenizer's files beside the model's weights")
    dataset = prepare(rows, processor, task=task, template=template, max_length=max_length)
    names = dataset.label_names
    if head and names is not None:  # only now is it known how many classes there are
        numbers = {label: number for number, label in enumerate(names)}
        torch.manual_seed(seed)
        model, _ = veneer.load_model(
            name, task=task, num_labels=len(names), id2label=dict(enumerate(names)), label2id=numbers, **given
        )
    return model, dataset


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
