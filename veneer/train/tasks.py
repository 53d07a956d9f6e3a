"""What a model learns: the loss of a batch, and the number of units that loss is a mean over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import UserError

IGNORED = -100
_ENDINGS = {
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForConditionalGeneration": "seq2seq",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "classification",
}


def task_of(model: nn.Module, given: str | None) -> str:
    """The task: as given, or read off the model's class (one label makes a regression).

    Raises UserError when the class does not tell.
    """
    if given is not None:
        return given
    names = [c.__name__ for c in type(model).__mro__]
    found = next((task for name in names for end, task in _ENDINGS.items() if name.endswith(end)), None)
    config = getattr(model, "config", None)
    if found == "seq2seq" and not getattr(config, "is_encoder_decoder", True):
        return "causal"
    if found == "classification":
        kind = getattr(config, "problem_type", None)
        return "regression" if kind == "regression" or (kind is None and config.num_labels == 1) else found
    if found is None:
        raise UserError(
            f"{type(model).__name__} does not say what it learns: give task= (causal, seq2seq, classification, "
            f"token-classification, regression, image-classification), or loss= (a function of model and batch)"
        )
    return found


class Task:
    """The loss of a batch; ``custom`` is the user's ``loss(model, batch)``, a mean over the batch's units."""

    def __init__(self, name: str, custom: Callable[[nn.Module, Any], Tensor] | None = None) -> None:
        self.name, self.custom = name, custom

    def units(self, batch: Any) -> int:
        """What the batch's loss is a mean over: labelled positions where labels stand at tokens, rows elsewhere.

        A causal model predicts each label from the position before it, so its first label in a row counts for nothing.
        """
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        at_tokens = isinstance(labels, Tensor) and labels.ndim > 1 and not labels.is_floating_point()
        if at_tokens and self.name not in ("regression", "classification", "image-classification"):
            shifted = labels[:, 1:] if self.name == "causal" else labels
            return int((shifted != IGNORED).sum())
        return rows_of(batch)

    def loss(self, model: nn.Module, batch: Any, packed: bool = True) -> Tensor:
        """Mean loss over the batch's units, 0-dim; ``packed`` as in ``causal_loss``."""
        if self.custom is None and self.name == "causal":
            from veneer.train.loss import causal_loss

            return self._checked(causal_loss(model, batch, packed=packed))
        return self._checked(self.custom(model, batch)) if self.custom else self.with_outputs(model, batch)[0]

    def with_outputs(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        """(mean loss, the model's outputs), for objectives that read them; a causal model's logits are late."""
        if self.custom is None and self.name != "causal":
            outputs = forward(model, batch)
            return self._checked(self._wide(outputs, batch)), outputs
        seen: list[Any] = []
        handle = model.register_forward_hook(lambda module, args, out: seen.append(out))
        try:
            loss = self.loss(model, batch, packed=False)
        finally:
            handle.remove()
        outputs = seen[0] if seen else None
        if self.custom is None:
            from veneer.train.loss import plain_head

            head = plain_head(model)
            outputs = outputs if head is None else LateLogits(outputs, head)
        return loss, outputs

    def _wide(self, outputs: Any, batch: Any) -> Any:
        """The model's loss; made again in fp32 where its logits have fewer bits, to which it would be rounded."""
        loss, logits, labels = getattr(outputs, "loss", None), getattr(outputs, "logits", None), batch.get("labels")
        if not isinstance(logits, Tensor) or logits.dtype not in (torch.bfloat16, torch.float16) or labels is None:
            return loss
        if self.name == "regression":
            return F.mse_loss(logits.float().view_as(labels), labels.float())
        if labels.is_floating_point() or logits.shape[:-1] != labels.shape:  # several classes at once
            return loss
        return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED)

    def plainly(self, model: nn.Module, batch: Any) -> Tensor:
        """The same mean loss by one plain forward of the whole model, in which every module's own forward runs."""
        if self.custom is None and self.name == "causal":
            return shifted_loss(forward(model, batch).logits, batch["labels"])
        return self.loss(model, batch)

    def _checked(self, loss: Any) -> Tensor:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            source = "loss=" if self.custom is not None else f"the model, under task={self.name},"
            raise UserError(f"{source} gave {_said(loss)} for a batch; one number (a 0-dim tensor) was expected")
        return loss.reshape(())


class LateLogits:
    """A causal model's outputs whose ``logits`` (B, T, V) are made of ``last_hidden_state`` (B, T, d) when asked for.

    ``causal_loss`` has the head pass the hidden states on; whoever reads no logits does not pay for them.
    """

    def __init__(self, outputs: Any, head: nn.Module) -> None:
        self._outputs, self._head = outputs, head
        self.last_hidden_state: Tensor = outputs.logits

    @cached_property
    def logits(self) -> Tensor:
        """The head's output at every position, with gradient."""
        return self._head(self.last_hidden_state)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._outputs, name)


def forward(model: nn.Module, batch: Any, **extra: Any) -> Any:
    """The model's outputs for a batch: a mapping as keywords, a tuple or list as arguments, else as the argument."""
    if isinstance(batch, Mapping):
        if "input_ids" in batch and hasattr(getattr(model, "config", None), "use_cache"):
            extra.setdefault("use_cache", False)
        return model(**batch, **extra)
    return model(*batch, **extra) if isinstance(batch, tuple | list) else model(batch, **extra)


def shifted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of predicting each label from the position before it: logits (B, T, V), labels (B, T)."""
    targets = labels[:, 1:]
    counted = targets != IGNORED
    picked, targets = logits[:, :-1][counted], targets[counted]
    return F.cross_entropy(picked.float(), targets, reduction="sum") / max(1, targets.numel())


def rows_of(batch: Any) -> int:
    """The number of rows of a batch: the first dimension of its first tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return next((rows_of(v) for v in values if isinstance(v, Tensor | Mapping | tuple | list)), 1)


def tokens_of(batch: Any) -> int:
    """Useful tokens of a batch, padding left out; rows where there are no tokens."""
    if isinstance(batch, Mapping):
        for key in ("attention_mask", "decoder_attention_mask"):
            if isinstance(batch.get(key), Tensor):
                return int(batch[key].sum())
        if isinstance(batch.get("input_ids"), Tensor):
            return batch["input_ids"].numel()
    return rows_of(batch)


def moved(batch: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The batch on ``device``; floating inputs other than labels in ``dtype`` when it is given."""
    if isinstance(batch, Tensor):
        cast = dtype is not None and batch.is_floating_point()
        return batch.to(device, dtype if cast else None)
    if isinstance(batch, Mapping):
        return {k: moved(v, device, None if k == "labels" else dtype) for k, v in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(moved(v, device, dtype) for v in batch)
    return batch


def _said(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"
