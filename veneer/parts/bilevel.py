"""Learning two things on two halves of the data: the form's weights on one, a few scores of its structure on the other.

A row always falls in the same half, whatever batch, epoch or process it comes in: a hash of its content decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn

from veneer.core.hook import Phase, Ranks, Run, Schedule
from veneer.fields import At

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter


def halves(batch: Any, seed: int = 0) -> tuple[Any | None, Any | None]:
    """The rows of a batch for weights and those for scores; None for a half that this batch has no row of."""
    held = torch.tensor([_bit(content, seed) for content in _contents(batch)], dtype=torch.bool)
    return tuple(_rows(batch, rows.nonzero().flatten(), len(held)) if rows.any() else None for rows in (~held, held))


def _contents(batch: Any) -> Iterator[bytes]:
    """What identifies each row: its tokens less padding, else its first tensor."""
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    x = values if isinstance(values, Tensor) else next(v for v in values if isinstance(v, Tensor))
    mask = None
    if isinstance(batch, Mapping):
        x, mask = batch.get("input_ids", x), batch.get("attention_mask")
    for i, row in enumerate(x.detach().cpu()):
        if mask is not None and mask.shape == x.shape:
            row = row[mask[i].cpu().bool()]
        yield (row.float() if row.is_floating_point() else row.long()).contiguous().numpy().tobytes()


def _bit(content: bytes, seed: int) -> bool:
    return hashlib.sha256(seed.to_bytes(8, "little", signed=True) + content).digest()[0] % 2 == 1


def _rows(batch: Any, at: Tensor, count: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[at.to(batch.device)] if batch.ndim and len(batch) == count else batch
    if isinstance(batch, Mapping):
        return {k: _rows(v, at, count) for k, v in batch.items()}
    return type(batch)(_rows(v, at, count) for v in batch) if isinstance(batch, tuple | list) else batch


def hypergradient(
    scores: list[Tensor],
    weights: list[nn.Parameter],
    outer: Callable[[], Tensor],
    inner: Callable[[], Tensor] | None = None,
    rate: float = 0.0,
) -> list[Tensor]:
    """∂ outer/∂ scores at w′ = w − rate·∇_w inner, which itself depends on the scores; the weights end as they were.

    Without ``inner`` the weights count as constant (first order). Else the second derivative is taken by differences,
    −rate·[∇_s inner(w + Rv) − ∇_s inner(w − Rv)]/2R with v = ∇_w outer(w′) and R = 0.01/‖v‖ (Liu et al. 2019, eq. 8).
    """
    if inner is None:
        return _gradients(outer(), scores)
    before = [w.detach().clone() for w in weights]
    _move(weights, before, _gradients(inner(), weights), -rate)
    found = _gradients(outer(), [*scores, *weights])
    direct, v = found[: len(scores)], found[len(scores) :]
    radius = 0.01 / float(torch.stack([g.float().norm() for g in v]).norm().clamp_min(1e-12))
    _move(weights, before, v, radius)
    up = _gradients(inner(), scores)
    _move(weights, before, v, -radius)
    down = _gradients(inner(), scores)
    _move(weights, before, v, 0.0)
    return [d - rate * (p - m) / (2 * radius) for d, p, m in zip(direct, up, down)]


def _gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in inputs]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(inputs, found)]


@torch.no_grad()
def _move(weights: list[nn.Parameter], start: list[Tensor], along: list[Tensor], size: float) -> None:
    for w, w0, d in zip(weights, start, along):
        w.copy_(w0 + size * d if size else w0)


class Bilevel(Ranks):
    """A rank method that learns scores of its form's structure in a first phase, and trains what they chose in another.

    A subclass gives ``scores_of``, ``relaxed``, ``install`` and ``apply``. In the search each micro-batch gives the
    form the gradient of one half of its rows, and the scores that of the other half at the same weights; both then
    step.
    """

    search: Annotated[float, At(gt=0, lt=1, doc="share of the run that looks for the structure")] = 0.4
    score_rate: Annotated[float, At(gt=0, doc="learning rate of the scores")] = 1e-2
    score_decay: Annotated[float, At(ge=0, doc="weight decay of the scores")] = 1e-3
    waiting: Annotated[float, At(ge=0, lt=1, doc="share of the search in which the scores stand still")] = 0.1
    unrolled: Annotated[bool, At(doc="let the scores see one step of the weights ahead")] = False

    def scores_of(self, adapter: Adapter) -> dict[str, Tensor]:
        """Where the scores start, by name."""
        raise NotImplementedError

    def relaxed(self) -> Tensor:
        """What the scores say, as the form reads it; differentiable."""
        raise NotImplementedError

    def install(self, value: Tensor | None) -> None:
        """Have the form run with this tensor in place of the numbers it holds; None: with those again."""
        raise NotImplementedError

    def apply(self) -> None:
        """Write what the scores say into the form, as numbers."""
        raise NotImplementedError

    @property
    def searching(self) -> bool:
        """Whether the structure is still open."""
        return self.adapter.phase == 0

    def phases(self) -> list[Phase]:
        return [Phase("search", self.search), Phase("train", 1 - self.search)]

    def on_attach(self, adapter: Adapter) -> None:
        self.moving, self.pace = False, 0.0
        self.scores = {n: nn.Parameter(t) for n, t in self.scores_of(adapter).items()} if self.searching else {}
        self.adam: torch.optim.Adam | None = None

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        self.adam, self.first, self.run = None, round(self.waiting * schedule.steps), schedule
        if self.searching:
            params = list(self.scores.values())
            self.adam = torch.optim.Adam(params, self.score_rate, (0.5, 0.999), weight_decay=self.score_decay)

    def before_step(self, step: int) -> None:
        self.moving = self.searching and step >= self.first
        self.pace = self.run.lr * self.run.factor(step)

    def micro_step(self, run: Run, batch: Any) -> Tensor:
        """Backward of this micro-batch; gives the loss of the rows that the weights learn from."""
        ours, held = halves(batch, self.seed) if self.searching else (batch, None)
        if self.moving and held is not None and not (self.unrolled and ours is None):
            self._note(run, ours, held)
        if ours is None:
            with torch.no_grad():
                return run.loss(held)
        loss = run.loss(ours)
        run.backward(loss)
        return loss

    def _note(self, run: Run, ours: Any, held: Any) -> None:
        """Add the gradient of the scores, with the weight that the micro-batch has."""
        leaf = self.relaxed().detach().requires_grad_()  # each pass has a graph of its own down to here
        inner = (lambda: run.loss(ours)) if self.unrolled else None
        weights = self.adapter.parameters() if self.unrolled else []
        with self.live(leaf):
            (found,) = hypergradient([leaf], weights, lambda: run.loss(held), inner, self.pace)
        run.backward((self.relaxed() * found).sum())

    @contextmanager
    def live(self, value: Tensor) -> Iterator[None]:
        """Within it the form runs with ``value``: the length of a pass and its backward, which may run blocks again."""
        self.install(value)
        try:
            yield
        finally:
            self.install(None)

    def after_step(self, step: int) -> None:
        if not self.moving:
            return
        self._agree()
        if any(s.grad is not None for s in self.scores.values()):
            self.adam.step()
            self.adam.zero_grad()
            self.apply()

    def _agree(self) -> None:
        """The mean of the gradients over processes."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for s in self.scores.values():
                s.grad = torch.zeros_like(s) if s.grad is None else s.grad
                torch.distributed.all_reduce(s.grad)
                s.grad /= torch.distributed.get_world_size()

    def state_dict(self) -> dict[str, Any]:
        if not self.searching:
            return {}
        state = {} if self.adam is None else self.adam.state_dict()["state"]
        return {"scores": {n: s.detach() for n, s in self.scores.items()}, "adam": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.get("scores", {}).items():
            self.scores[name].data.copy_(value)
        if state.get("adam") and self.adam is not None:
            self.adam.load_state_dict(self.adam.state_dict() | {"state": state["adam"]})
        if state and self.searching:
            self.apply()
