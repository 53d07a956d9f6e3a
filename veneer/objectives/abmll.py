"""ABMLL: amortised Bayesian meta-learning, a start from which a few steps adapt to a new task."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn

from veneer.core.hook import Objective, Run, Schedule
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics import chance
from veneer.numerics.gaussian import Gaussian, divergence, surprise
from veneer.parts.modes import in_mode
from veneer.parts.state import State, clone

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter

TASK = "task"  # the column that says which task a row is of


@method("abmll", axis="objective", paper="arXiv:2508.14285", system=88, defaults="gaussian-lora")
class ABMLL(Objective):
    """Learn one Gaussian over the weights, θ, that is both start and prior for every task's own, φ.

    A micro-batch holds a few tasks. For each: φ ← θ; K steps of descent on −log p(support|φ) + β·KL(φ‖θ) with θ held;
    then L = −log p(query|φ) + β·KL(φ‖θ). The loss is the mean of L over the tasks, less γ·log p(θ),
    p(θ) = N(μ; 0, I)·Gamma(1/v; 2, c/5) (Zhang et al. 2025; Ravi & Beatson 2019). First order: the gradient in φ counts
    as one in θ, beside that of the KL; no graph goes through the inner steps. One draw of the weights a pass, by the
    step and the task, so that tasks shared out among processes are drawn as in one.

    The form is ``gaussian-lora``. Tensors that train beside it (a new head) get the outer gradient alone. θ is the
    adapter; a φ is a state that ``adapt`` gives: ``with adapter.using(hook.adapt(batch)): hook.predict(rows)``. Memory
    does not grow with the number of tasks.

    Which task a row is of stands in a column ``task`` of the batch, numbers (B,), which the model does not see: see
    ``Episodes``. Of each task's rows in a batch the first share ``support`` adapts, the others judge; a batch without
    the column is one task. Rows of a file, shuffled, are no tasks: give ``fit`` batches. Its held-out loss is that of θ
    itself, on batches without the column.

    Defaults: β = 5e-10 and γ = 1e-6, two tasks a batch (``Episodes``), from reviews of the paper. β/v pulls the mean,
    and descent wants β·(inner rate)/c < 2: with β = 1e-7, of another version, an inner rate under 0.04. K = 5, the
    inner rate 0.1 with the gradient's norm held to 1, the query's half of the rows, the prior's numbers and the rate
    5e-3 are ours; no code was found. Dropout is off in the inner steps. The paper sums over tasks; the mean is the
    loop's habit, and only γ feels it. KL and prior are taken in fp32 whatever the model's precision.
    """

    beta: Annotated[float, At(ge=0, doc="β, weight of KL(φ‖θ)")] = 5e-10
    gamma: Annotated[float, At(ge=0, doc="γ, weight of −log p(θ)")] = 1e-6
    inner_steps: Annotated[int, At(ge=0, doc="K, steps of a task")] = 5
    inner_rate: Annotated[float, At(gt=0, doc="learning rate of these steps")] = 0.1
    inner_clip: Annotated[float, At(gt=0, doc="largest norm of their gradient")] = 1.0
    support: Annotated[float, At(ge=0, lt=1, doc="share of a task's rows that adapts")] = 0.5

    reads_outputs = False
    usual_rate = 5e-3

    def on_attach(self, adapter: Adapter) -> None:
        self._handle: Any = None
        self.step = self.micro = 0  # which say, with the task, what is drawn: the same on however many processes
        odd = next((d for d in adapter.members() if not hasattr(d, "gaussian")), None)
        if odd is not None:
            raise UserError(
                f"abmll learns a Gaussian over the weights, which {odd.name} has none of: use gaussian-lora"
            )

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        self.on_end()
        self._handle = adapter.model.register_forward_pre_hook(_without_task, prepend=True, with_kwargs=True)

    def before_step(self, step: int) -> None:
        self.step, self.micro = step, 0

    def on_end(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def micro_step(self, run: Run, batch: Any) -> Tensor:
        """The gradient of a batch of tasks at θ; gives its loss."""
        found = {p: torch.zeros_like(p) for p in self.adapter.parameters()}
        tasks, self.micro = _tasks(batch), self.micro + 1
        losses = [self._task(run, rows, found, name) for name, rows in tasks.items()]
        for slope in found.values():
            slope /= len(tasks)
        loss = torch.stack(losses).mean() + self._prior(found)
        run.backward(sum((p * slope).sum() for p, slope in found.items()))
        return loss

    def adapt(self, batch: Any, loss: Callable[[Any], Tensor] | None = None, steps: int | None = None) -> State:
        """φ for the task of these rows, as a state for ``adapter.using`` or ``load_state``; θ stays as it is.

        Args:
            batch: all of it is support.
            loss: its mean loss, 0-dim; by default the ``loss`` that the model itself gives for ``model(**batch)``.
            steps: inner steps, K when not given.
        """
        own = loss or (lambda rows: self.adapter.model(**rows).loss)
        with torch.enable_grad(), self._copied() as before:
            self._descend(lambda: own(batch), before, ("adapt",), self.inner_steps if steps is None else steps)
            return clone(self.adapter.state())

    @torch.no_grad()
    def predict(self, batch: Mapping[str, Tensor], samples: int = 8) -> Tensor:
        """Probabilities (…, classes), the mean over ``samples`` draws of the weights; 0: at their mean."""
        inputs = {k: v for k, v in batch.items() if k not in ("labels", TASK)}
        total: Tensor | None = None
        for number in range(max(1, samples)):
            with self._still(("predict", number) if samples else None):
                found = self.adapter.model(**inputs).logits.float().softmax(-1)
            total = found if total is None else total + found
        return total / max(1, samples)

    def _task(self, run: Run, rows: Any, found: dict[nn.Parameter, Tensor], name: int) -> Tensor:
        """Adapt to one task and add the gradients of its outer loss to ``found``; gives that loss."""
        support, query = _split(rows, self.support)
        draw = (self.step, self.micro, name)
        with self._copied() as before:
            if support is not None:
                self._descend(lambda: run.loss(support), before, ("inner", *draw), self.inner_steps)
            with self._drawn(("outer", *draw)):
                loss = run.loss(query)
                slopes = torch.autograd.grad(loss, list(found), allow_unused=True)
            for p, slope in zip(found, slopes):
                if slope is not None:
                    found[p] += slope
            loss = loss.detach()
            for phi, theta, log_c in self._gaussians(before) if self.beta else ():
                value, of_phi, of_theta = divergence(phi, theta, log_c)
                loss = loss + self.beta * value
                for p, a, b in zip(phi, of_phi, of_theta):
                    found[p] += self.beta * (a + b)
        return loss

    def _descend(self, loss: Callable[[], Tensor], before: dict[nn.Parameter, Tensor], draw: tuple, steps: int) -> None:
        """Move φ, which the form's own tensors hold, by ``steps`` of clipped descent."""
        params = list(before)
        for k in range(steps):
            with self._still((*draw, k)):
                slopes = torch.autograd.grad(loss(), params, allow_unused=True)
            found = {p: torch.zeros_like(p) if s is None else s for p, s in zip(params, slopes)}
            for phi, theta, log_c in self._gaussians(before) if self.beta else ():
                for p, slope in zip(phi, divergence(phi, theta, log_c)[1]):
                    found[p] += self.beta * slope
            norm = float(torch.stack([s.norm() for s in found.values()]).norm())
            with torch.no_grad():
                for p, slope in found.items():
                    p -= self.inner_rate * min(1.0, self.inner_clip / max(norm, 1e-30)) * slope

    def _prior(self, found: dict[nn.Parameter, Tensor]) -> Tensor | float:
        """γ·(−log p(θ)), its gradient added to ``found``."""
        total: Tensor | float = 0.0
        for d in self.adapter.members() if self.gamma else ():
            value, slopes = surprise(d.gaussian(), d.log_variance)
            total = total + self.gamma * value
            for p, slope in zip(d.gaussian(), slopes):
                found[p] += self.gamma * slope
        return total

    def _gaussians(self, before: dict[nn.Parameter, Tensor]) -> Iterator[tuple[Gaussian, Gaussian, float]]:
        """(φ, θ, log c) of every site."""
        for d in self.adapter.members():
            phi = d.gaussian()
            yield phi, Gaussian(*(before[p] for p in phi)), d.log_variance

    @contextmanager
    def _copied(self) -> Iterator[dict[nn.Parameter, Tensor]]:
        """Within it the form's tensors may become φ; they are θ again, bit for bit, afterwards. Gives θ."""
        before = {p: p.detach().clone() for d in self.adapter.members() for p in d.gaussian()}
        try:
            yield before
        finally:
            with torch.no_grad():
                for p, value in before.items():
                    p.copy_(value)

    @contextmanager
    def _still(self, draw: tuple | None) -> Iterator[None]:
        """Eval mode, with the weights drawn for these words and numbers; None: at their mean."""
        with in_mode(self.adapter.model), self._drawn(draw):
            yield

    @contextmanager
    def _drawn(self, draw: tuple | None) -> Iterator[None]:
        """The weights drawn for these words and numbers; None: as the model's mode has them."""
        for d in self.adapter.members():
            d.sampled = draw
        try:
            yield
        finally:
            for d in self.adapter.members():
                d.sampled = None


class Episodes:
    """Batches of whole tasks: ``together`` tasks a batch, ``size`` rows of each, drawn without repetition.

    Rows of the tasks alternate, so that of two processes each gets its own task. An epoch has ``length`` batches, by
    default so many that every task comes once; its content is a function of seed and epoch alone.

    Args:
        data: columns, tensors of equal length by name, or anything with ``batch(rows)``, as a ``veneer.data.Dataset``.
        tasks: the task of every row, any names.
    """

    def __init__(
        self,
        data: Any,
        tasks: Sequence[Hashable],
        size: int,
        *,
        together: int = 2,
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        self.data, self.size, self.seed, self.number = data, size, seed, 0
        self.rows: dict[Hashable, list[int]] = {}
        for row, task in enumerate(tasks):
            self.rows.setdefault(task, []).append(row)
        self.together = min(together, len(self.rows))
        short = next((t for t, rows in self.rows.items() if len(rows) < size), None)
        if not self.rows or short is not None:
            has = f"the task {short!r} has {len(self.rows[short])}" if self.rows else "there is no task"
            raise UserError(f"Episodes draws {size} rows of a task, and {has}; give a smaller size or more rows")
        self.length = -(-len(self.rows) // self.together) if length is None else length

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, number: int) -> None:
        """The epoch that is iterated next."""
        self.number = number

    def __iter__(self) -> Iterator[dict[str, Any]]:
        g, names, left = chance.generator(self.seed, "episodes", self.number), list(self.rows), []
        for _ in range(self.length):
            if len(left) < self.together:
                left = torch.randperm(len(names), generator=g).tolist()
            now, left = left[: self.together], left[self.together :]
            drawn = [torch.randperm(len(self.rows[names[t]]), generator=g)[: self.size].tolist() for t in now]
            rows = [self.rows[names[t]][k] for step in zip(*drawn) for t, k in zip(now, step)]
            yield self._batch(rows) | {TASK: torch.tensor(now).repeat(self.size)}

    def _batch(self, rows: list[int]) -> dict[str, Any]:
        if hasattr(self.data, "batch"):
            return self.data.batch(rows)
        return {name: column[rows] for name, column in self.data.items()}


def _without_task(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {k: v for k, v in kwargs.items() if k != TASK}


def _tasks(batch: Any) -> dict[int, Any]:
    """The rows of each task by its number, in the order in which the tasks come."""
    if not isinstance(batch, Mapping):
        raise UserError(f"abmll takes batches by name (input_ids, labels, task), not a {type(batch).__name__}")
    columns = {k: v for k, v in batch.items() if k != TASK}
    if TASK not in batch:
        return {0: columns}
    of = torch.as_tensor(batch[TASK])
    return {t: _taken(columns, (of == t).nonzero()[:, 0], len(of)) for t in dict.fromkeys(of.tolist())}


def _split(rows: dict[str, Any], share: float) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """(support or None, query) of one task's rows, in their order; a query has at least one row."""
    count = len(next(v for v in rows.values() if isinstance(v, Tensor)))
    first = min(round(share * count), count - 1)
    order = torch.arange(count)
    return _taken(rows, order[:first], count) if first else None, _taken(rows, order[first:], count)


def _taken(rows: dict[str, Any], at: Tensor, count: int) -> dict[str, Any]:
    per_row = {k for k, v in rows.items() if isinstance(v, Tensor) and v.ndim and len(v) == count}
    return {k: v[at.to(v.device)] if k in per_row else v for k, v in rows.items()}
