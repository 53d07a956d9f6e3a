"""The arguments of a run, checked before any long work starts."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from veneer.errors import UserError
from veneer.fields import At, Fields

TASKS = ("causal", "seq2seq", "classification", "token-classification", "regression", "image-classification")
KINDS = ("linear", "cosine", "constant", "constant-with-warmup", "inverse-sqrt")

# Adapters on language models: QLoRA (arXiv:2305.14314, table 9) trains 7B and 13B models at 2e-4. Classifiers on
# encoders: LoRA (arXiv:2106.09685, table 9) trains RoBERTa-base at 4e-4 to 5e-4. Whole weights: 2e-5, as Alpaca.
RATE, HEAD_RATE, WRITTEN_RATE = 2e-4, 5e-4, 2e-5
WARMUP = 0.03  # of the steps: QLoRA, table 9


class Settings(Fields):
    """How a run trains; ``fit`` takes these as keywords and ``veneer train`` as flags."""

    name: ClassVar[str] = "fit"

    task: Annotated[Literal[TASKS] | None, At(doc="what the model learns; by its class when not given")] = None
    epochs: Annotated[float | None, At(gt=0, doc="passes over the data; 1 when neither this nor steps is given")] = None
    steps: Annotated[int | None, At(ge=1, doc="optimiser steps; instead of epochs")] = None
    batch_size: Annotated[int, At(ge=1, doc="rows a micro-batch, over all processes")] = 8
    accumulate: Annotated[int, At(ge=1, doc="micro-batches an optimiser step")] = 1
    lr: Annotated[float | None, At(gt=0, doc="peak learning rate; by the form and the task when not given")] = None
    warmup: Annotated[float | None, At(ge=0, doc="steps of warm-up, or below 1 a share of the steps")] = None
    schedule: Annotated[Literal[KINDS], At(doc="shape of the learning rate after the warm-up")] = "linear"
    weight_decay: Annotated[float, At(ge=0, doc="AdamW's decoupled decay")] = 0.0
    clip: Annotated[float | None, At(ge=0, doc="largest norm of the gradient; 0: no clipping")] = 1.0
    eval_every: Annotated[int | None, At(ge=1, doc="steps between evaluations; each epoch when not given")] = None
    eval_batch_size: Annotated[int | None, At(ge=1, doc="rows a batch in evaluation; else twice batch_size")] = None
    early_stopping: Annotated[int | None, At(ge=1, doc="evaluations without a better loss before stopping")] = None
    save_every: Annotated[int | None, At(ge=1, doc="steps between checkpoints; a tenth of the run by default")] = None
    save_total: Annotated[int | None, At(ge=1, doc="checkpoints kept")] = 2
    max_length: Annotated[int | None, At(ge=2, doc="tokens a row; longer rows are cut")] = None
    order: Annotated[
        Literal["auto", "shuffled", "length"],
        At(doc="of rows: shuffled, or batches of like length; auto: shuffled where padding is left out, else length"),
    ] = "auto"
    seed: Annotated[int, At(ge=0, doc="of the order of the data and of dropout")] = 0
    checkpointing: Annotated[bool, At(doc="recompute activations in backward: less memory, more time")] = False
    precision: Annotated[Literal["auto", "fp32", "bf16"], At(doc="of the base's computation")] = "auto"
    log: Annotated[Literal["tensorboard"] | None, At(doc="also log there")] = None
    template: Annotated[str | None, At(doc="chat template put around prompt and completion")] = None

    FREE: ClassVar[tuple[str, ...]] = ("save_every", "save_total", "log", "eval_batch_size")  # may differ on resuming

    def __init__(self, **given: Any) -> None:
        self.set_fields(given)
        if self.steps is not None and self.epochs is not None:
            raise UserError(f"fit: steps={self.steps} and epochs={self.epochs:g} were both given; give one of them")

    def shape(self, steps: int) -> tuple[str, int]:
        """The kind of schedule and its warm-up in steps, for a run of ``steps``."""
        kind = "constant" if self.schedule == "constant-with-warmup" else self.schedule
        share = self.warmup
        if share is None:
            share = 0.0 if self.schedule == "constant" else WARMUP
        warmup = round(share * steps) if share < 1 else round(share)
        if warmup > steps:
            raise UserError(f"fit: warmup={self.warmup:g} is longer than the run of {steps} steps")
        return kind, warmup

    def binding(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run it goes on with."""
        return {k: v for k, v in self.field_values().items() if k not in self.FREE}
