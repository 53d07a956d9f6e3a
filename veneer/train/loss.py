"""The loss of a causal language model, with logits only where there is a label, a chunk of positions at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from veneer.errors import UserError
from veneer.kernels import softmax
from veneer.models import architecture
from veneer.models.fast import fast_forms, packs
from veneer.models.packing import packing, rounded
from veneer.parts.plain import plain, positionwise

IGNORED = -100
CHUNK = 256  # positions whose logits exist at one time
PIECE = 1 << 18  # fp32 numbers of a softmax that stays in the processor's cache
# Configs whose models change the logits after the head.
AFTER_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


def causal_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    chunk: int = CHUNK,
    reduction: Literal["mean", "sum"] = "mean",
    packed: bool = True,
) -> Tensor:
    """Cross entropy of predicting each label from the position before it.

    The model's own forward runs, hooks and wrappers included, in its fast forms and with its head passing the hidden
    states on; then the head sees labelled positions alone, in chunks, and the gradient of the hidden states is made in
    the same pass as the loss, so that the tokens × vocabulary matrix never exists. Works on a wrapped model too
    (DistributedDataParallel, FSDP): the wrapper's forward is what is called.

    A model that does something to its logits after the head (soft-capping, scaling, a logits bias), or is no
    transformers model, makes all logits by its own forward. Of an encoder–decoder, whose labels are not shifted, the
    model's own loss is returned.

    Args:
        model: gives logits for ``batch`` without its labels.
        batch: ``input_ids`` (B, T) and whatever else the model takes, and ``labels`` (B, T), not shifted; −100 is
            ignored.
        chunk: positions whose logits exist at one time.
        reduction: mean over labelled positions, or their sum, to be divided by the count over several batches. A batch
            without a label gives 0.
        packed: let rows run as one without padding, in which what several begin with (as far as it has no label) is
            computed once, where the model and what hangs on it allow that (Llama's kind on the CPU, no adapter on
            whole modules); hooks on the model then see that row.

    Returns:
        The loss, 0-dim, fp32.

    Raises:
        UserError: no ``labels``, or labels of another shape than the tokens.
    """
    inputs = dict(batch) if isinstance(batch, Mapping) else {}
    labels = inputs.pop("labels", None)
    if not isinstance(labels, Tensor):
        given = f"the keys {', '.join(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
        raise UserError(
            f"causal_loss got a batch with {given}; a mapping with labels (B, T) beside its inputs is needed"
        )
    tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if isinstance(tokens, Tensor) and tokens.shape[:2] != labels.shape:
        raise UserError(
            f"causal_loss got labels of shape {tuple(labels.shape)} for tokens of shape {tuple(tokens.shape[:2])}; "
            f"give one label per token, −100 where none is to be learned"
        )
    bare = getattr(model, "module", model)
    config = getattr(bare, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return _own_loss(model, inputs, labels, reduction)
    if hasattr(config, "use_cache"):
        inputs.setdefault("use_cache", False)
    head = plain_head(bare)
    pack = packing(inputs, labels != IGNORED) if packed and leaves_padding_out(bare) else None
    inputs = inputs if pack is None else pack.inputs(inputs)
    with fast_forms(bare, plain, packing=pack):
        if head is None:
            outputs = model(**inputs)
            states = _logits(outputs)
        else:
            with _passing_on(head):
                outputs = model(**inputs)
            states = outputs.logits
    targets = labels[:, 1:]
    counted = (targets != IGNORED).reshape(-1).nonzero()[:, 0]
    targets = targets.reshape(-1)[counted]
    row, time = counted // (labels.shape[1] - 1), counted % (labels.shape[1] - 1)
    at = row * labels.shape[1] + time if pack is None else pack.source[row, time]
    states = states.flatten(0, 1).index_select(0, at)
    loss = _loss_of_logits(states, targets) if head is None else head_loss(states, head, targets, chunk)
    auxiliary = getattr(outputs, "aux_loss", None)
    count = max(1, targets.numel())
    loss = loss / count if reduction == "mean" else loss
    if isinstance(auxiliary, Tensor):
        loss = loss + auxiliary.to(loss) * getattr(config, "router_aux_loss_coef", 1.0) * (
            1 if reduction == "mean" else count
        )
    return loss


def leaves_padding_out(model: nn.Module) -> bool:
    """Whether ``causal_loss`` computes on no padding here: rows run packed as one."""
    return packs(model) and positionwise(model)


class LossModule(nn.Module):
    """A model whose forward gives the loss, for wrappers that act on forward: ``DDP(LossModule(model))(batch)``."""

    def __init__(self, model: nn.Module, chunk: int = CHUNK) -> None:
        super().__init__()
        self.model, self.chunk = model, chunk

    def forward(self, batch: Mapping[str, Any], reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """``causal_loss`` of the batch."""
        return causal_loss(self.model, batch, chunk=self.chunk, reduction=reduction)


def _own_loss(model: nn.Module, inputs: dict[str, Any], labels: Tensor, reduction: str) -> Tensor:
    loss = model(**inputs, labels=labels).loss.float()
    count = (labels != IGNORED).sum()
    if not count:
        loss = torch.nan_to_num(loss)
    return loss if reduction == "mean" else loss * count


def plain_head(model: nn.Module) -> nn.Module | None:
    """The output head, if what it gives are the model's logits; None where the model does more, or has no head."""
    config = getattr(model, "config", None)
    changed = any(getattr(config, name, None) not in (None, 1, 1.0) for name in AFTER_HEAD)
    head = architecture.head(model)
    usable = callable(getattr(model, "get_output_embeddings", None)) and model.get_output_embeddings() is head
    if head is None or changed or not usable or hasattr(model, "final_logits_bias") or "forward" in head.__dict__:
        return None
    return head


@contextmanager
def _passing_on(head: nn.Module) -> Iterator[None]:
    """For one pass the head gives what it gets."""
    head.__dict__["forward"] = lambda states, *args, **kwargs: states
    try:
        yield
    finally:
        del head.__dict__["forward"]


def _logits(outputs: Any) -> Tensor:
    found = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if found is None and isinstance(outputs, tuple | list):
        found = outputs[0]
    if not isinstance(found, Tensor) or found.ndim != 3:
        said = f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else "missing"
        raise UserError(f"the model's logits are {said}; causal_loss needs them as (B, T, vocabulary)")
    return found


def _loss_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def head_loss(states: Tensor, head: nn.Module, targets: Tensor, chunk: int = CHUNK) -> Tensor:
    """Summed cross entropy of ``head(states)``: states (N, d), targets (N,), 0-dim in fp32.

    A plain linear head takes the fused way; any other (adapted, sharded, hooked) is called on each chunk, and called
    again in backward.
    """
    weight = getattr(head, "weight", None)
    hooked = head._forward_hooks or head._forward_pre_hooks
    if type(head) is nn.Linear and not hooked and not hasattr(weight, "to_local") and weight.dtype == states.dtype:
        return _HeadLoss.apply(states, weight, head.bias, targets, chunk)

    def part(states: Tensor, targets: Tensor) -> Tensor:
        return _loss_of_logits(head(states), targets)

    pieces = [
        checkpoint(part, s, t, use_reentrant=False, preserve_rng_state=False)
        for s, t in zip(states.split(chunk), targets.split(chunk))
    ]
    return torch.stack(pieces).sum()


def _to_gradient(logits: Tensor, targets: Tensor, sums: torch.dtype) -> Tensor:
    """Summed cross entropy of logits (n, vocabulary), which become its gradient; a few rows at a time in ``sums``."""
    if sums == torch.float32 and softmax.takes(logits):
        return softmax.to_gradient(logits, targets)
    wanted = targets[:, None]
    highest, own = logits.amax(1, keepdim=True).to(sums), logits.gather(1, wanted).to(sums)
    rows = max(1, PIECE // logits.shape[1]) if logits.device.type == "cpu" else logits.shape[0]
    fine = torch.empty(2, min(rows, logits.shape[0]), logits.shape[1], dtype=sums, device=logits.device)
    total = (highest - own).sum()
    for piece, one in zip(logits.split(rows), wanted.split(rows)):
        x, p = fine[:, : piece.shape[0]]
        torch.softmax(x.copy_(piece), 1, out=p)
        # The largest probability is e⁰ over the sum: the logarithm of the sum without forming it again.
        total -= p.amax(1).log().sum()
        piece.copy_(p.scatter_add_(1, one, p.new_full(one.shape, -1.0)))
    return total


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, bias, targets, chunk):
        need_states, need_weight, need_bias = ctx.needs_input_grad[:3]
        sums = torch.promote_types(states.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=sums) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=sums) if need_bias else None
        total = torch.zeros((), dtype=sums, device=states.device)
        count = states.shape[0]
        full = count - count % chunk
        states = F.pad(states, (0, 0, 0, full + rounded(count - full) - count))
        grad_states = torch.empty_like(states) if need_states else None
        memory = states.new_empty(min(chunk, states.shape[0]), weight.shape[0])
        for at in range(0, states.shape[0], chunk):
            h, wanted = states[at : at + chunk], targets[at : at + chunk]
            logits = memory[: h.shape[0]]
            if bias is None:
                torch.mm(h, weight.t(), out=logits)
            else:
                torch.addmm(bias, h, weight.t(), out=logits)
            total += _to_gradient(logits[: wanted.shape[0]], wanted, sums)
            logits[wanted.shape[0] :] = 0
            if need_states:
                torch.mm(logits, weight, out=grad_states[at : at + chunk])
            if need_weight:
                grad_weight += logits.t() @ h
            if need_bias:
                grad_bias += logits.sum(0, dtype=sums)
        grad_states = grad_states[:count] if need_states else None
        ctx.save_for_backward(grad_states, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total.to(torch.promote_types(torch.float32, sums))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        states, weight, bias = ctx.saved_tensors
        if states is not None:
            states = states * grad.to(states.dtype)
        if weight is not None:
            weight = (weight * grad).to(ctx.dtypes[0])
        if bias is not None:
            bias = (bias * grad).to(ctx.dtypes[1])
        return states, weight, bias, None, None
