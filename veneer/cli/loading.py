"""A model whose form fits the data: the task and the number of classes are read off the rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from veneer.errors import UserError

if TYPE_CHECKING:
    from veneer.data import Dataset, Rows

FORMS = {"classification": "sequence-classification"}  # where the model's form and the task differ in name


def model_and_examples(
    name: str, rows: Rows, *, task: str | None = None, template: str | None = None, max_length: int | None = None
) -> tuple[Any, Dataset]:
    """The model, with a head for the classes that ``rows`` hold, and the rows as its examples."""
    import veneer
    from veneer.data import prepare
    from veneer.data.tasks import detect

    task = task or detect(rows)
    form = FORMS.get(task, task)
    model, processor = veneer.load_model(name, task=form)
    if processor is None:
        raise UserError(f"{name} holds no tokenizer; put the tokenizer's files beside the model's weights")
    dataset = prepare(rows, processor, task=task, template=template, max_length=max_length)
    names = dataset.label_names
    if names is not None:  # only now is it known how many classes the head needs
        numbers = {label: number for number, label in enumerate(names)}
        model, _ = veneer.load_model(
            name, task=form, num_labels=len(names), id2label=dict(enumerate(names)), label2id=numbers
        )
    return model, dataset
