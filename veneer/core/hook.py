"""Hooks: what acts during training, and the classes that methods of the other axes derive from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.site import Site
from veneer.errors import UserError
from veneer.fields import Fields
from veneer.numerics.schedule import Schedule

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter

Plan = dict[str, dict[str, Any] | None]  # site path → overrides of the delta's fields; None drops the site
Run = Callable[..., Any]  # run(batch, adapter="on" | "off" | state) → the model's outputs


@dataclass(frozen=True)
class Phase:
    """One phase of a method: its share of the run's steps and the slots that train in it (None: all)."""

    name: str
    share: float = 1.0
    trainable: tuple[str, ...] | None = None


class Hook(Fields):
    """Acts at fixed points of the loop; ``self.adapter`` is set before ``on_attach``.

    ``step`` counts optimiser steps from 0. Statistics over accumulation are gathered per micro-batch (in ``loss``)
    and read in ``after_backward``. Tensors of a hook that train live in ``parameters``.
    """

    axis: ClassVar[str] = ""
    adapter: Adapter
    seed: ClassVar[int] = 0  # set on the instance by attach
    reads_outputs: ClassVar[bool] = True  # whether ``loss`` looks at the model's outputs, which are None else
    usual_rate: ClassVar[float | None] = None  # the learning rate the method lives on when that is not the form's

    def __init__(self, **fields: Any) -> None:
        self.set_fields(fields)

    def components_wanted(self, form: dict[str, Any]) -> int:
        """How many principal components or sketch dimensions the evidence keeps, given the form's fields."""
        return int(form.get("rank") or 16)

    def trains(self, model: nn.Module) -> list[str]:
        """Names of base tensors that this method trains as they are, beside its form."""
        return []

    def on_attach(self, adapter: Adapter) -> None:
        """The deltas are built and hung."""

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        """Training is about to start: ``adapter.optimizer`` stands."""

    def before_step(self, step: int) -> None:
        """Before the first forward of an optimiser step."""

    def loss(self, outputs: Any, batch: Any, run: Run) -> Tensor | None:
        """A term added to the micro-batch's loss (a mean), or None."""
        return None

    def after_backward(self, step: int) -> None:
        """The gradients are whole, not yet clipped."""

    def before_optimizer(self, step: int) -> None:
        """After clipping, before the optimiser."""

    def after_step(self, step: int) -> None:
        """The weights have moved and the gradients are still there: masks and proximal maps."""

    def on_epoch(self, epoch: int) -> None:
        """An epoch of the data has ended."""

    def phases(self) -> list[Phase]:
        """The phases of this method; an empty list when it has one."""
        return []

    def on_phase_end(self, phase: Phase) -> Plan | None:
        """A phase has ended; a Plan makes the adapter be rebuilt to it."""
        return None

    def on_end(self) -> None:
        """Training has ended."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trained tensors of the hook itself, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: numbers, strings, lists, dicts and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        if state:
            raise UserError(f"{self.name} was saved with a state it cannot read: {sorted(state)}")

    # ``micro_step(run, batch) → loss`` replaces forward, loss and backward; only methods that need it define it.


class Init(Hook):
    """Where a delta starts.

    ``start`` returns tensors by slot role. With ``offset`` the core freezes copies of the started factors and
    subtracts their product, so that the start equals the base. ``needs`` names the evidence wanted
    (see ``evidence.NEEDS``). An init may also define ``plan(sites, evidence, budget)``.
    """

    axis = "init"
    offset: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    starts_at_base: ClassVar[bool] = True
    delta: Any  # the one being started

    def start(self, site: Site, slots: list[Any], evidence: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Tensors by role for one site; roles left out keep the delta's own start."""
        raise NotImplementedError

    def before_conversion(self, site: Site, storage: Storage) -> None:
        """The layer at ``site`` is about to be converted: look at W, or write what shall be stored."""

    def settle(self, adapter: Adapter, batches: Iterable[Any]) -> None:
        """Measure and rescale once all sites are set."""


class Ranks(Hook):
    """How much capacity goes where, and when; may define ``plan(sites, evidence, budget)``."""

    axis = "ranks"
    needs: ClassVar[frozenset[str]] = frozenset()

    def survey(self, model: nn.Module, sites: list[Site], batches: list[Any]) -> None:
        """Look at the model and the task's batches before ``plan``; the model must be left as it was."""


class Optim(Hook):
    """How a gradient becomes a step."""

    axis = "optim"

    def groups(self, adapter: Adapter) -> list[dict[str, Any]] | None:
        """Parameter groups with ``params``, ``names`` and settings (``rate`` multiplies the run's), or None."""
        return None

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | None:
        """The optimiser of the run, or None for the loop's own; at most one method of a recipe gives one."""
        return None

    def rate(self, group: dict[str, Any], step: int) -> float:
        """A factor on a group's scheduled rate."""
        return 1.0

    # ``product``: a stand-in for ``lowrank_linear`` with the same value and another backward.


class Objective(Hook):
    """What is added to the loss."""

    axis = "objective"


class Storage(Hook):
    """How the frozen weight is stored and run; the base axis."""

    axis = "base"

    def places(self, sites: list[Site]) -> list[Site]:
        """The sites whose layers are converted: by default every whole linear one."""
        return [s for s in sites if s.kind == "linear"]

    def convert(self, site: Site) -> None:
        """Put the layer at ``site`` into this storage, in place."""
        raise NotImplementedError
