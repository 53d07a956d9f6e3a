"""GLAD: the gradient is steered by the one at a sharpness-aware perturbed point."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from veneer.core.hook import Objective, Run
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.parts.whole_gradients import refuse_sharded

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter
    from veneer.core.hook import Schedule

Tensors = list[Tensor]


class Pass(NamedTuple):
    """A micro-batch as it was run: its weight in the step, and where chance stood."""

    batch: Any
    weight: float
    draws: int
    random: dict[str, Any]


def _dot(a: Tensors, b: Tensors) -> Tensor:
    return sum((x.double() * y.double()).sum() for x, y in zip(a, b))


def ascent(theta: Tensors, g: Tensors, rho: float, adaptive: bool = False) -> Tensors:
    """ε = ρ·g/‖g‖ over all tensors together; adaptive: ε = ρ·θ²g/‖θg‖, which follows the scale of each entry."""
    norm = torch.stack(torch._foreach_norm([t * x for t, x in zip(theta, g)] if adaptive else g)).norm() + 1e-12
    return [x * (rho / norm) * (t.square() if adaptive else 1.0) for t, x in zip(theta, g)]


def steered(g: Tensors, reference: Tensors, mode: str, share: float) -> Tensors:
    """ĝ of the gradient g and the reference, each as if it were one vector; see `GLAD`."""
    if mode == "blend":
        return [torch.lerp(x, s, share) for x, s in zip(g, reference)]
    if mode == "project":
        conflict, square = _dot(g, reference), _dot(reference, reference)
        return [x - (conflict / square).to(x.dtype) * s for x, s in zip(g, reference)] if conflict < 0 else g
    a, b = _dot(g, g).sqrt(), _dot(reference, reference).sqrt()
    if a == 0 or b == 0:
        return g
    u = [(1 - share) * x / a.to(x.dtype) + share * s / b.to(s.dtype) for x, s in zip(g, reference)]
    length = _dot(u, u).sqrt().clamp_min(1e-30)
    return [x * (a / length).to(x.dtype) for x in u]


def harmonic_mean(base: float, novel: float) -> float:
    """2bn/(b + n) of the accuracies on classes that trained and on held-out ones; 0 when both are 0."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0


@method("glad", axis="objective", paper="arXiv:2507.13089", system=83, defaults="lora")
class GLAD(Objective):
    """A second gradient, at θ + ρ·g/‖g‖ on the same batch, steers the first (Peng et al. 2025).

    θ is all that trains, g = ∇L(θ) over the whole accumulated batch, g_s = ∇L(θ + ε). The optimiser sees

    ===========  ==================================================================================
    ``mode``     ĝ
    ===========  ==================================================================================
    ``blend``    (1 − λ)g + λ·g_s: to first order ∇(L + λρ‖∇L‖); λ = 1 is SAM's step
    ``project``  g less what opposes g_s, g − (⟨g, g_s⟩/‖g_s‖²)g_s where ⟨g, g_s⟩ < 0; else g
    ``align``    g's length along (1 − λ)g/‖g‖ + λ·g_s/‖g_s‖
    ===========  ==================================================================================

    **Not the authors' rule**: they published the idea (LoRA, steered by SAM's gradient) and no code, and their
    equations could not be read. The three rules cover the likely forms; ``blend`` is the default, since g and g_s
    hardly ever conflict at a small ρ, which leaves ``project`` without effect. ρ = 0.05 is SAM's usual value, λ = 0.5
    ours.

    Costs a second forward and backward (``every=k``: each k-th step) and, within a step, copies of θ and g. θ comes
    back from its copy, bit for bit; both passes see the same dropout; the second changes no statistics and no state.
    The file is the form's. ``ascent="adaptive"`` is ASAM's ε = ρ·θ²g/‖θg‖: entries at 0, as all of LoRA's B at first,
    stay. Clipping follows. For two-tower models: rank 4 on q, k, v of both towers, the temperature frozen.
    """

    rho: Annotated[float, At(ge=0, doc="ρ, length of the ascent")] = 0.05
    share: Annotated[float, At(ge=0, le=1, doc="λ, of the reference")] = 0.5
    mode: Annotated[Literal["blend", "project", "align"], At(doc="how the reference steers")] = "blend"
    ascent: Annotated[Literal["plain", "adaptive"], At(doc="SAM's direction or ASAM's")] = "plain"
    every: Annotated[int, At(ge=1, doc="steps from one steered step to the next")] = 1

    def on_attach(self, adapter: Adapter) -> None:
        self.passes: list[Pass] = []
        self.due = False

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        self.processes = schedule.processes
        refuse_sharded(self.name, adapter.parameters())

    def before_step(self, step: int) -> None:
        """Whether this step is steered; at ρ = 0, or with λ = 0 in the modes that have one, g is all there is."""
        inert = not self.rho or (not self.share and self.mode != "project")
        self.passes, self.due = [], step % self.every == 0 and not inert

    def micro_step(self, run: Run, batch: Any) -> Tensor:
        """The first pass; what the second needs is noted."""
        if not self.due:
            loss = run.loss(batch)
            run.backward(loss)
            return loss
        self.runner = run
        draws, random = self.adapter.root.draws, _chance()
        loss = run.loss(batch)
        run.backward(loss)
        weight = torch.ones_like(loss, requires_grad=True)  # its gradient is the weight that the loop gives this batch
        run.backward(weight)
        self.passes.append(Pass(batch, float(weight.grad), draws, random))
        return loss

    def after_backward(self, step: int) -> None:
        """The second pass over all micro-batches of the step, at θ + ε, and ĝ in the gradients' place."""
        passes, self.passes = self.passes, []
        params = [p for p in self.adapter.parameters() if p.grad is not None]
        if not passes:
            return
        if not params:
            raise UserError("glad steers the gradients of a whole step, and another method has used them up already")
        g = [p.grad for p in params]
        if not all(torch.isfinite(n) for n in torch._foreach_norm(g)):
            return  # the loop reports it
        theta, now = [p.detach().clone() for p in params], (self.adapter.root.draws, _chance())
        try:
            with torch.no_grad():
                for p, e in zip(params, ascent(theta, g, self.rho, self.ascent == "adaptive")):
                    p.add_(e)
            reference = self._gradients(passes, params)
        finally:
            with torch.no_grad():
                for p, value in zip(params, theta):
                    p.copy_(value)
            self.adapter.root.draws = now[0]
            _set_chance(now[1])
        for p in self.adapter.parameters():
            p.grad = None
        for p, x in zip(params, steered(g, reference, self.mode, self.share)):
            p.grad = x

    def _gradients(self, passes: list[Pass], params: list[nn.Parameter]) -> Tensors:
        """The gradients of the accumulated batch at the parameters as they are, averaged over the processes."""
        for p in self.adapter.parameters():
            p.grad = None
        for one in passes:
            self.adapter.root.draws = one.draws
            _set_chance(one.random)
            (self.runner.loss(one.batch) * one.weight).backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        for x in found if self.processes > 1 else ():
            dist.all_reduce(x)
            x /= self.processes
        return found


def _chance() -> dict[str, Any]:
    """Where torch's generators stand."""
    own = {"cpu": torch.get_rng_state()}
    return own | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


def _set_chance(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
