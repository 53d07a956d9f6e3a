"""The loop: micro-batches into optimiser steps, with every hook at its point."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.context import Context, current
from veneer.core.hook import Hook
from veneer.errors import UserError
from veneer.numerics.schedule import Schedule
from veneer.train import checkpoint, optimizer
from veneer.train.feed import BatchFeed, Micro, RowFeed
from veneer.train.finite import NotFiniteError, culprit
from veneer.train.processes import Processes
from veneer.train.settings import Settings
from veneer.train.shards import gathered, load_state, local, sharded
from veneer.train.tasks import Task, forward, moved

POINTS = ("before_step", "loss", "micro_step", "after_backward", "before_optimizer", "after_step", "on_epoch")


@dataclass
class Progress:
    """Where a run is: all of it is in every checkpoint."""

    step: int = 0  # optimiser steps done
    epoch: int = 0
    index: int = 0  # micro-batches of this epoch done
    tokens: int = 0  # useful tokens seen
    seconds: float = 0.0  # in training, over all sittings
    losses: list[float] = field(default_factory=list)
    held_out: list[list[float]] = field(default_factory=list)  # [step, loss]
    best: float | None = None
    waited: int = 0  # evaluations since the best
    stopped: bool = False  # by early stopping
    idle: list[str] | None = None  # trained tensors that have had no gradient yet; None before the first step


class Runner:
    """``run`` as hooks get it: further forwards of the model on a batch, and the loop's own loss.

    ``run(batch, adapter="on")`` gives the model's outputs with the adapter as it is; ``"off"`` without it and without
    gradients; a state (as ``adapter.state()``, possibly in part) with those tensors and without gradients. Keywords go
    to the model's forward. For ``micro_step``: ``run.loss(batch)`` is the whole loss of the micro-batch (the task's,
    the auxiliary losses of the forward pass, the recipe's objectives), a mean, 0-dim; ``run.backward(loss)`` adds its
    gradients with the weight that the micro-batch has in the accumulated batch.
    """

    def __init__(self, adapter: Adapter, loss: Callable[[Any], Tensor], backward: Callable[[Tensor], None]) -> None:
        self.adapter, self.loss, self.backward = adapter, loss, backward

    def __call__(self, batch: Any, adapter: str | dict[str, Tensor] = "on", **extra: Any) -> Any:
        own = self.adapter
        batch = unlabelled(own.model, batch) if isinstance(batch, Mapping) else batch
        if isinstance(adapter, str) and adapter == "on":
            return forward(own.model, batch, **extra)
        other = own.disabled() if isinstance(adapter, str) else own.using(adapter)
        with other, torch.no_grad():
            return forward(own.model, batch, **extra)


def unlabelled(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without its labels, which stay where ``forward`` asks for them and feed a decoder that reads them."""
    if "labels" not in batch:
        return dict(batch)
    asked = inspect.signature(model.forward).parameters.get("labels")
    if asked is not None and asked.default is asked.empty:
        return dict(batch)
    bare = {k: v for k, v in batch.items() if k != "labels"}
    shifted = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shifted is not None and not {"decoder_input_ids", "decoder_inputs_embeds"} & bare.keys():
        bare["decoder_input_ids"] = shifted(labels=batch["labels"])
    return bare


def overridden(hook: Hook, point: str) -> bool:
    """Whether a hook acts at a point of the loop."""
    own = getattr(type(hook), point, None)
    return own is not None and own is not getattr(Hook, point, None)


class Training:
    """A run on its way. ``take_step`` makes one optimiser step; ``state`` and ``load`` carry it over a break."""

    def __init__(
        self,
        adapter: Adapter,
        feed: RowFeed | BatchFeed,
        task: Task,
        settings: Settings,
        processes: Processes,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.adapter, self.feed, self.task, self.settings, self.processes = adapter, feed, task, settings, processes
        self.dtype = dtype
        self.at = Progress()
        self.runner = Runner(adapter, self.loss, self._backward)
        self.weight = 1.0
        self.schedule = Schedule(1)
        self.phase_start = 0
        self.rate = 0.0
        self.norm = 0.0
        self.epoch_random = checkpoint.random_state()
        self._stream: Iterator[Micro] | None = None
        self._passes: list[Context] | None = None
        self.total = self._total()
        self.ends = self._ends()

    def _total(self) -> int:
        if self.settings.steps is not None:
            return self.settings.steps
        if self.feed.length is None:
            raise UserError("the data has no length, so the run has no end: give steps=")
        per_epoch = math.ceil(self.feed.length / self.settings.accumulate)
        return math.ceil((self.settings.epochs or 1.0) * per_epoch)

    def _ends(self) -> list[int]:
        """The step at which each phase of the recipe ends, by the shares of those that are left."""
        first = self.adapter.phase
        shares = [p.share for p in self.adapter.phases[first:]]
        ends = [round(sum(shares[: i + 1]) / sum(shares) * self.total) for i in range(len(shares))]
        if any(b <= a for a, b in zip([0, *ends], ends)):
            raise UserError(f"{self.total} steps are too few for the {len(ends)} phases of {self.adapter.recipe}")
        return [0] * first + ends

    # -- phases --------------------------------------------------------------------------------------------------------

    def begin_phase(self, lr: float) -> None:
        """Make the optimiser and the schedule of the adapter's current phase, and tell the hooks."""
        phase = self.adapter.phase
        self.phase_start = self.ends[phase - 1] if phase else 0
        steps = self.ends[phase] - self.phase_start
        kind, warmup = self.settings.shape(steps)
        self.schedule = Schedule(
            steps,
            lr,
            warmup,
            kind,
            accumulate=self.settings.accumulate,
            clip=self.settings.clip or None,
            processes=self.processes.world,
        )
        self.adapter.optimizer = optimizer.build(self.adapter, lr, self.settings.weight_decay)
        self.hooks = {point: [h for h in self.adapter.hooks if overridden(h, point)] for point in POINTS}
        for hook in self.adapter.hooks:
            hook.on_start(self.adapter, self.schedule)

    @property
    def phase_end(self) -> int:
        """The step at which the current phase ends."""
        return self.ends[self.adapter.phase]

    # -- one step ------------------------------------------------------------------------------------------------------

    def take_step(self) -> float:
        """One optimiser step; gives the loss, a mean over the units of the whole accumulated batch.

        Raises:
            NotFiniteError: the loss or the gradient is not finite; all is then as before the step.
        """
        began = time.perf_counter()
        adapter, opt, k = self.adapter, self.adapter.optimizer, self.at.step - self.phase_start
        before = (self.at.epoch, self.at.index, adapter.root.draws, torch.get_rng_state())
        micros, ended = self._take()
        units, tokens = self.processes.sum(sum(m.units for m in micros), sum(m.tokens for m in micros))
        self.rate = optimizer.set_rates(adapter, opt, self.schedule, k)
        self._call("before_step", k)
        loss = sum(self._micro(m, m.units / max(units, 1)) for m in micros)
        params = optimizer.parameters(opt)
        self.processes.average_gradients(params)
        (loss,) = self.processes.sum(float(loss))
        self._call("after_backward", k)
        norm = optimizer.gradient_norm(params)
        self.norm = float(norm)
        if not (math.isfinite(loss) and math.isfinite(self.norm)):
            self._fail(loss, micros, before)
        if self.settings.clip:
            optimizer.clip(params, self.norm, self.settings.clip)
        self._call("before_optimizer", k)
        self.rate = optimizer.set_rates(adapter, opt, self.schedule, k)
        opt.step()
        self._call("after_step", k)
        self._note_gradients()
        opt.zero_grad(set_to_none=True)
        self.at.step += 1
        self.at.tokens += int(tokens)
        self.at.losses.append(loss)
        if ended:
            self._end_epoch()
        self.at.seconds += time.perf_counter() - began
        return loss

    def _call(self, point: str, step: int) -> None:
        for hook in self.hooks[point]:
            getattr(hook, point)(step)

    def _take(self) -> tuple[list[Micro], bool]:
        """The micro-batches of the next step, all of one epoch, and whether that epoch ends with them."""
        if self._stream is None:
            self.epoch_random = checkpoint.random_state()
            self._stream = self.feed.epoch(self.at.epoch)
        micros: list[Micro] = []
        for micro in self._stream:
            micros.append(micro)
            if len(micros) == self.settings.accumulate:
                break
        self.at.index += len(micros)
        if micros:
            done = self.at.index == self.feed.length
            return micros, done
        if self.at.index == 0:
            raise UserError("the data gave no batch; at least one was expected")
        self._end_epoch()  # the length was not known: the epoch had ended with the step before
        return self._take()

    def _end_epoch(self) -> None:
        for hook in self.hooks["on_epoch"]:
            hook.on_epoch(self.at.epoch)
        self.at.epoch, self.at.index, self._stream = self.at.epoch + 1, 0, None

    def _micro(self, micro: Micro, share: float) -> Tensor:
        """Forward and backward of one micro-batch; gives its part of the step's loss.

        Gradients are averaged over processes afterwards, hence the factor.
        """
        batch = moved(micro.batch, self.processes.device, self.dtype)
        self.weight = share * self.processes.world
        if self.hooks["micro_step"]:
            loss = self.hooks["micro_step"][0].micro_step(self.runner, batch)
        else:
            loss = self.loss(batch)
            self._backward(loss)
        return loss.detach() * share

    def _backward(self, loss: Tensor) -> None:
        (loss * self.weight).backward()

    def loss(self, batch: Any) -> Tensor:
        """The whole loss of a micro-batch: the task's, the passes' auxiliary losses, the objectives'."""
        model, outputs = self.adapter.model, None
        with Passes(model) as passes:
            if any(h.reads_outputs for h in self.hooks["loss"]):
                loss, outputs = self.task.with_outputs(model, batch)
            else:
                loss = self.task.loss(model, batch)
        for term in (passes.auxiliary(), *(h.loss(outputs, batch, self.runner) for h in self.hooks["loss"])):
            loss = loss if term is None else loss + term
        return loss

    def _note_gradients(self) -> None:
        """Keep the list of trained tensors that have had no gradient so far; short after the second step.

        A tensor that was stepped inside backward has state, and its gradient is gone.
        """
        if self.at.idle == []:
            return
        stepped = self.adapter.optimizer.state
        named = {n: p for n, p in self.adapter.named_parameters() if p.grad is not None or p not in stepped}
        left = list(named) if self.at.idle is None else [n for n in self.at.idle if n in named]
        if not left:
            self.at.idle = []
            return
        with_gradient = [n for n in left if named[n].grad is not None]
        largest = [0.0] * len(left)
        if with_gradient:
            norms = torch._foreach_norm([local(named[n].grad) for n in with_gradient], math.inf)
            found = dict(zip(with_gradient, torch.stack(norms).tolist()))
            largest = [found.get(n, 0.0) for n in left]
        self.at.idle = [n for n, m in zip(left, self.processes.sum(*largest)) if not m > 0]

    def _fail(self, loss: float, micros: list[Micro], before: tuple[int, int, int, Tensor]) -> None:
        """Go back to before the step and say what was not finite, where it came from and in which rows."""
        self.at.epoch, self.at.index, draws, random = before
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {self.norm}"
        where = "it is not traced further on a sharded model"
        if not any(sharded(p) for p in self.adapter.model.parameters()):
            self._set_chance(draws, random)
            batches = [moved(m.batch, self.processes.device, self.dtype) for m in micros]
            found = self.processes.gather([culprit(self.adapter, batches, self.task.plainly)])
            where = next((w for w in found if w), "it did not come again when the batch was run once more")
        self._set_chance(draws, random)
        rows = self.feed.where(self.processes.gather([r for m in micros for r in m.rows]))
        raise NotFiniteError(f"step {self.at.step + 1}: {what}; {where}; the batch holds {rows}")

    def _set_chance(self, draws: int, random: Tensor) -> None:
        self.adapter.root.draws = draws
        torch.set_rng_state(random)

    # -- over a break --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs to go on bit for bit, as a tree of tensors and plain data."""
        return {
            "progress": asdict(self.at),
            "random": checkpoint.random_state(),
            "epoch_random": self.epoch_random,
            "adapter": gathered(self.adapter.state()),
            "fields": self.adapter.description()["fields"],
            "sites": list(self.adapter.deltas),
            "training": self.adapter.training_state(),
            "optimizer": gathered(optimizer.state_by_name(self.adapter, self.adapter.optimizer)),
        }

    def load(self, state: dict[str, Any], lr: float) -> None:
        """Go back to where ``state`` was taken: phase, plan, tensors, optimiser, hooks, data and chance."""
        adapter = self.adapter
        restore(adapter, state["fields"], state["sites"], state["training"]["phase"])
        self.begin_phase(lr)
        load_state(adapter, state["adapter"])
        adapter.load_training_state(state["training"])
        optimizer.load_state_by_name(adapter, adapter.optimizer, state["optimizer"])
        self.at = Progress(**state["progress"])
        checkpoint.set_random_state(state["epoch_random"])
        self.epoch_random = state["epoch_random"]
        self._stream = self.feed.epoch(self.at.epoch, self.at.index) if self.at.index else None
        checkpoint.set_random_state(state["random"])


def restore(adapter: Adapter, fields: dict[str, dict[str, Any]], sites: list[str], phase: int) -> None:
    """Give every site the form it had: phases and rank methods may have changed fields or dropped sites."""
    now, given = adapter.description()["fields"], {k: v for p in adapter.recipe.parts for k, v in p.fields.items()}
    plan: dict[str, dict[str, Any] | None] = {}
    for path in adapter.deltas:
        if path not in sites:
            plan[path] = None
        elif now.get(path, {}) != fields.get(path, {}):
            form = type(adapter.deltas[path])
            own = {k: given.get(k, getattr(form, k)) for k in now.get(path, {})}
            plan[path] = own | fields.get(path, {})
    if plan:
        adapter.rebuild(plan)
    adapter.phase = phase
    adapter.start_phase()


class Passes:
    """While entered, the contexts of the model's forward passes, for their auxiliary losses."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.contexts: list[Context] = []

    def __enter__(self) -> Passes:
        self.handle = self.model.register_forward_pre_hook(self._note)
        return self

    def _note(self, module: nn.Module, args: tuple) -> None:
        context = current()
        if context is not None and not any(c is context for c in self.contexts):
            self.contexts.append(context)

    def __exit__(self, *error: object) -> None:
        self.handle.remove()

    def auxiliary(self) -> Tensor | None:
        """The sum of all auxiliary losses of the passes, or None when there is none."""
        found = [loss for context in self.contexts if (loss := context.total_loss()) is not None]
        return torch.stack(found).sum() if found else None
