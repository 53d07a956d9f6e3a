"""lr-batch: the learning rate that belongs to a batch size, and a probe that proposes one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor

from veneer.core.hook import Optim, Run
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.batch_noise import Kind, scale_lr
from veneer.numerics.chance import derived_seed
from veneer.parts.curvature import Curvature, curvature_probe

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter
    from veneer.core.hook import Schedule

LIGHT = 1e-3  # Ritz values with less weight than this say nothing of the bulk
CONDITION = 1e4  # largest ratio of curvatures that the momentum is set for


def proposed(found: Curvature, safety: float = 0.5) -> tuple[float, float]:
    """The rate and momentum of SGD that suit a spectrum: (2/(√L + √μ))², times ``safety``, and ((√L − √μ)/(√L + √μ))².

    L is the largest |θ|, μ the smallest positive Ritz value with weight, at least L/10⁴.
    """
    L = found.top
    positive = [v for v, w in zip(found.values, found.weights) if v > 0 and w > LIGHT]
    mu = max(min(positive, default=0.0), L / CONDITION)
    high, low = math.sqrt(L), math.sqrt(mu)
    return safety * (2 / (high + low)) ** 2, ((high - low) / (high + low)) ** 2


def summed(values: list[float], device: torch.device) -> list[float]:
    """Numbers summed over the processes, by way of the device they train on."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    together = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(together)
    return together.tolist()


@method("lr-batch", axis="optim", paper="arXiv:2006.09092", system=69)
class LRBatch(Optim):
    """Scales the rate with the batch, and probes the curvature that limits it (Granziol, Zohren & Roberts 2020).

    A batch's Hessian shows λ′(B) = λ + c/(𝔟λ) instead of λ, 𝔟 = B/(1 − B/N): small batches look more curved and allow
    smaller steps, α = 2/λ′ for SGD and about its root for Adam. With ``reference`` the run's rate is taken as found at
    that many rows a step and scaled to the rows of this run: by B/B₀ for SGD and √(B/B₀) for Adam (``paper``), by
    that up to λ′(B₀)/λ (``capped``), or by λ′(B₀)/λ′(B) (``measured``, its root for Adam).

    Every ``probe`` steps m steps of Lanczos on the step's last micro-batch give L = max|θ| and μ, and propose
    lr = ½·(2/(√L + √μ))² and momentum ((√L − √μ)/(√L + √μ))², smoothed over probes by ½; they stand in ``probes`` by
    step. ``follow`` sets both where the optimiser is SGD. For Adam the ratios √(L₀/L) of the probes scale the rate.

    No tensors and no state but the proposals. λ and c come from probes at several sizes:
    ``veneer.parts.curvature.curvature_probe`` and ``veneer.numerics.batch_noise.fit_noise``.

    Defaults: m = 20; safety, smoothing and the bounds of μ are this implementation's, as is the learner, whose exact
    form in the paper is not public. The published linear rule has no long stretch in the one-spike model itself: α goes
    √𝔟, then 1/λ at 𝔟 = c/λ², then at most 2/λ. Low-rank adapters are saddles at their start, so |θ| counts; a probe
    before they have moved says little. Probes take differences of gradients, since the fused product is not
    differentiated twice; dropout is off in them. They bound stability and know nothing of generalisation or warm-up.
    """

    reference: Annotated[int | None, At(ge=1, doc="B₀, rows a step at which the run's rate was found")] = None
    rule: Annotated[Literal["paper", "capped", "measured"], At(doc="how the rate follows the batch")] = "paper"
    curvature: Annotated[float | None, At(gt=0, doc="λ, measured: for the rules that need it")] = None
    noise: Annotated[float | None, At(ge=0, doc="c, measured: for the rules that need it")] = None
    probe: Annotated[int | None, At(ge=1, doc="steps between two probes; none when None")] = None
    depth: Annotated[int, At(ge=1, doc="m, steps of Lanczos")] = 20
    safety: Annotated[float, At(gt=0, le=1, doc="on the proposed rate")] = 0.5
    smoothing: Annotated[float, At(ge=0, lt=1, doc="share of the proposals before that stays")] = 0.5
    follow: Annotated[bool, At(doc="train at the proposed rate, instead of noting it")] = False

    reads_outputs = False
    rows = 0  # of a step, as far as is known
    seen = 0  # of the step under way, here
    per_step = 1
    base = 1.0  # the rate of the run
    last: tuple[Any, Run] | None = None
    busy = False

    def on_attach(self, adapter: Adapter) -> None:
        self.probes: dict[int, dict[str, float]] = {}
        if self.rule != "paper" and (self.curvature is None or self.noise is None):
            raise UserError(f"lr-batch(rule={self.rule!r}) needs curvature= and noise= from a probe")
        if self.follow and self.probe is None:
            raise UserError("lr-batch(follow=True) follows probes: say how often by probe=")

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        self.per_step, self.base = schedule.accumulate * schedule.processes, schedule.lr

    def loss(self, outputs: Any, batch: Any, run: Run) -> Tensor | None:
        if not self.busy:
            tensors = batch.values() if hasattr(batch, "values") else batch
            count = next(len(t) for t in tensors if isinstance(t, Tensor))
            self.rows, self.seen = self.rows or count * self.per_step, self.seen + count
            self.last = (batch, run)
        return None

    def before_step(self, step: int) -> None:
        self.seen = 0

    def before_optimizer(self, step: int) -> None:
        """The rows of the step are known: all micro-batches', all processes'."""
        (self.rows,) = (round(n) for n in summed([self.seen], self._device()))

    def _device(self) -> torch.device:
        return self.adapter.parameters()[0].device

    def kind(self) -> Kind:
        """Whether the run's optimiser is SGD; every other counts as adaptive."""
        return "sgd" if isinstance(self.adapter.optimizer, torch.optim.SGD) else "adam"

    def rate(self, group: dict[str, Any], step: int) -> float:
        """The factor of the rule, known once the step's first batch has been seen, or of the last probe."""
        factor, kind = 1.0, self.kind()
        if self.reference is not None and self.rows:
            factor = scale_lr(1.0, self.reference, self.rows, kind, self.rule, self.curvature, self.noise)
        if self.follow and self.probes:
            found = list(self.probes.values())
            if kind == "adam":
                return factor * math.sqrt(found[0]["top"] / found[-1]["top"])
            if "momentum" in group:
                group["momentum"] = found[-1]["momentum"]
            return found[-1]["lr"] / self.peak(group)
        return factor

    def peak(self, group: dict[str, Any]) -> float:
        """The rate that the run gives this group before its schedule."""
        return self.base * group.get("rate", 1.0)

    def after_step(self, step: int) -> None:
        if self.probe is not None and step % self.probe == 0 and self.last is not None:
            self.probes[step] = self.look(step)

    def look(self, step: int) -> dict[str, float]:
        """Probe the curvature on the last micro-batch; of several processes' parts the mean of what they propose."""
        batch, run = self.last
        root = self.adapter.root
        draws, self.busy = root.draws, True
        try:
            seed = derived_seed(self.seed, "lr-batch", step)
            params = list(self.adapter.parameters())
            found = curvature_probe(self.adapter.model, lambda: run.loss(batch), params, self.depth, seed, exact=False)
        finally:
            root.draws, self.busy = draws, False
        lr, momentum = proposed(found, self.safety)
        said = {"top": found.top, "largest": found.largest, "smallest": found.smallest, "lr": lr, "momentum": momentum}
        total, *sums = summed([1.0, *said.values()], self._device())
        said = {k: v / total for k, v in zip(said, sums)}
        if self.probes:
            before = list(self.probes.values())[-1]
            said = {k: self.smoothing * before[k] + (1 - self.smoothing) * v for k, v in said.items()}
        return said

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "probes": {str(k): v for k, v in self.probes.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state.get("rows", 0)
        self.probes = {int(k): v for k, v in state.get("probes", {}).items()}
