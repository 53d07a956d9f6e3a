"""Once-for-All: one adapter of which every leading part is usable, shrunk in stages, and cut to a budget afterwards."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.hook import Phase, Plan, Ranks, Run
from veneer.core.registry import method
from veneer.core.site import site_at
from veneer.errors import UserError
from veneer.fields import At
from veneer.models import architecture
from veneer.numerics.chance import generator
from veneer.numerics.evolution import draw, evolve, ridge
from veneer.parts.components import Components, components

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter

Sizes = dict[str, float]  # share of the components of a site, of the hidden units of an MLP, by path
TINY = 1e-6  # least norm of a row of A over the largest after balancing: a row of zeros would never move again


def kept(share: float, whole: int) -> int:
    """How many of ``whole`` a share is, rounded up."""
    return math.ceil(share * whole - 1e-9)


@torch.no_grad()
def balance(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with the same product, component j being its j-th singular direction, in that order."""
    if not B.any():
        return A, B
    Qb, Rb = torch.linalg.qr(B.double())
    Qa, Ra = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T)
    root = S.sqrt().clamp_min(TINY * float(S[0].sqrt()))
    rows, columns = root[:, None] * (Vh[: len(S)] @ Qa.T), (Qb @ U[:, : len(S)]) * (S / root)
    left = len(A) - len(S)  # more components than the product has directions
    spare = A.double()[:left] if left else A.new_zeros(0, A.shape[1]).double()
    return torch.cat([rows, spare]).to(A), torch.cat([columns, B.new_zeros(len(B), left).double()], 1).to(B)


@method("elastic", axis="ranks", paper="arXiv:1908.09791", system=120, wants=("components",), defaults="lora")
class Elastic(Ranks):
    """Train one adapter so that each of its slices works, then take the slice that fits (Cai et al. 2020, on adapters).

    A slice gives each site a share of its components, ΔW = s·B[:, :ρ]A[:ρ], and each MLP a share f of its hidden units:
    a smaller one is the leading part of a larger. First the whole trains; then, stage by stage, smaller sizes are
    admitted. A step of a stage runs ``subnets`` slices, the size of every site drawn from those open, and adds up the
    gradients of their losses, each with κ times the cross entropy against the whole adapter as it was after the first
    phase. ``pick`` looks for the best slice within a budget without training, ``cut`` makes it real.

    Before the second phase the components of each site are put in the order of the singular values of BA, which leaves
    BA as it is; before later stages those inside the smallest size open go by ‖B_j‖‖A_j‖. Hidden units count in the
    order of the L1 norms of the columns of the down projection's W; W itself is not permuted.

    Defaults: shares 1, ½, ¼, ⅛ of the rank (0 leaves sites out, which is depth), no widths, 0.4 of the run for the
    whole, κ = 1 and uniform draws as in the official code, which takes 1, 2 and 4 slices a step by stage. Ranks, the
    order by singular values and the equal stages are this transfer's. The scale stays α/R; ``scaling="per-rank"`` is
    α/ρ. ``sandwich`` adds the largest and the smallest slice to every step, from later work; without it the whole loses
    a point or two. ``progressive=False`` opens all sizes at once. Kernel sizes are left out, and statistics of batch
    norms stay the base's. Widths want blocks whose MLP is one module. What is drawn depends on seed and step alone.
    """

    ranks: Annotated[tuple[float, ...], At(doc="shares of a site's rank, from 1 downwards")] = (
        1.0,
        0.5,
        0.25,
        0.125,
    )
    widths: Annotated[tuple[float, ...], At(doc="shares of an MLP's hidden units, from 1 downwards")] = (1.0,)
    whole: Annotated[float, At(gt=0, lt=1, doc="share of the run in which the whole trains")] = 0.4
    subnets: Annotated[int, At(ge=1, doc="slices a step")] = 2
    sandwich: Annotated[bool, At(doc="add the largest and the smallest slice to every step")] = False
    distill: Annotated[float, At(ge=0, doc="κ, weight of the whole adapter's own outputs as targets")] = 1.0
    distance: Annotated[Literal["classes", "squares"], At(doc="cross entropy of logits, or squared error")] = "classes"
    order: Annotated[Literal["svd", "norm", "none"], At(doc="how components are sorted before they are cut")] = "svd"
    scaling: Annotated[Literal["constant", "per-rank"], At(doc="s = α/R or α/ρ")] = "constant"
    progressive: Annotated[bool, At(doc="admit smaller sizes one by one")] = True

    @property
    def reads_outputs(self) -> bool:
        """Only while there is a teacher."""
        return bool(self.distill and self.teacher)

    @property
    def stages(self) -> list[tuple[int, int]]:
        """How many of the ranks and of the widths are open in each phase."""
        r, w = len(self.ranks), len(self.widths)
        if not self.progressive:
            return [(1, 1)] + [(r, w)] * (r * w > 1)
        return [(1, 1), *((i, 1) for i in range(2, r + 1)), *((r, i) for i in range(2, w + 1))]

    def phases(self) -> list[Phase]:
        later = len(self.stages) - 1
        rest = [Phase(f"{r} ranks, {w} widths", (1 - self.whole) / later) for r, w in self.stages[1:]]
        return [Phase("whole", self.whole), *rest]

    def on_attach(self, adapter: Adapter) -> None:
        for name in ("ranks", "widths"):
            sizes = getattr(self, name)
            if not sizes or sizes[0] != 1 or list(sizes) != sorted(set(sizes), reverse=True) or sizes[-1] < 0:
                raise UserError(f"elastic: {name}={sizes} must begin with 1 and fall, as in (1.0, 0.5, 0.25)")
        self.step, self.soft, self.teacher = 0, None, {}
        self.parts = components(adapter)
        self.mlps = hidden_units(adapter.model) if len(self.widths) > 1 else {}
        if len(self.widths) > 1 and (self.widths[-1] <= 0 or not self.mlps):
            raise UserError("elastic: widths want a model with gated or plain MLP modules, and shares above 0")

    @contextmanager
    def at(self, sizes: Mapping[str, float]) -> Iterator[None]:
        """Within it the model runs as this slice; what ``sizes`` leaves out is whole."""
        handles = []
        for path, share in sizes.items():
            if path in self.parts:
                c = self.parts[path]
                mask = torch.zeros(c.rank, device=c.A.device)
                n = kept(share, c.rank)
                mask[:n] = self._gain(c.rank, n)
                c.delta.gate = mask
            elif share < 1:
                module, order, _ = self.mlps[path]
                mask = torch.zeros(len(order), device=order.device)
                mask[order[: kept(share, len(order))]] = 1.0
                handles.append(module.register_forward_pre_hook(_times(mask)))
        try:
            yield
        finally:
            for c in self.parts.values():
                c.delta.gate = None
            for h in handles:
                h.remove()

    def _gain(self, rank: int, n: int) -> float:
        return rank / max(1, n) if self.scaling == "per-rank" else 1.0

    def choices(self, stage: tuple[int, int] | None = None) -> dict[str, tuple[float, ...]]:
        """The sizes that each site and MLP can have; at a stage, those open."""
        r, w = self.stages[-1] if stage is None else stage
        return dict.fromkeys(self.parts, self.ranks[:r]) | dict.fromkeys(self.mlps, self.widths[:w])

    def drawn(self, step: int, index: int) -> Sizes:
        """The slice number ``index`` of a step of the phase under way."""
        g = generator(self.seed, "elastic", self.adapter.phase, step, index)
        open_now = self.choices(self.stages[self.adapter.phase])
        return {p: s[int(torch.randint(len(s), (), generator=g))] for p, s in open_now.items()}

    # -- training

    def before_step(self, step: int) -> None:
        self.step = step

    def micro_step(self, run: Run, batch: Any) -> Tensor:
        """Forward and backward of the slices of this step; gives the mean of their losses."""
        slices: list[Sizes] = [{}]
        if self.adapter.phase:
            slices = [self.drawn(self.step, k) for k in range(self.subnets)]
            open_now = self.choices(self.stages[self.adapter.phase])
            slices += [{}, {p: s[-1] for p, s in open_now.items()}] if self.sandwich else []
        self.soft = None if not self.reads_outputs else _logits(run(batch, adapter=self.teacher))
        losses = []
        for sizes in slices:
            with self.at(sizes):
                loss = run.loss(batch)
                run.backward(loss)
            losses.append(loss.detach())
        self.soft = None
        return torch.stack(losses).mean()

    def loss(self, outputs: Any, batch: Any, run: Run) -> Tensor | None:
        if self.soft is None:
            return None
        z, q = _logits(outputs), self.soft
        if z.ndim == 3 and isinstance(batch, Mapping) and "labels" in batch:  # positions that have a label
            counted = F.pad(batch["labels"][:, 1:] != -100, (0, 1)) if z.shape[:2] == batch["labels"].shape else None
            z, q = (z, q) if counted is None else (z[counted], q[counted])
        z, q = z.float(), q.float()
        if self.distance == "squares":
            return self.distill * F.mse_loss(z, q)
        return -self.distill * (q.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()

    @torch.no_grad()
    def on_phase_end(self, phase: Phase) -> Plan | None:
        if self.adapter.phase + 1 == len(self.stages):
            self.teacher = {}
            return None
        inside = min(self.ranks[: self.stages[self.adapter.phase][0]])
        for c in self.parts.values() if self.order != "none" else ():
            if self.adapter.phase == 0 and self.order == "svd" and all(isinstance(t, nn.Parameter) for t in (c.A, c.B)):
                for t, value in zip((c.A, c.B), balance(c.A, c.B)):
                    t.copy_(value)
            else:
                c.prune(sorting(c, kept(inside, c.rank)))
        if self.adapter.phase == 0 and self.distill:
            self.teacher = {n: p.detach().clone() for n, p in self.adapter.named_parameters()}
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.teacher} if self.teacher else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.teacher = dict(state.get("teacher", {}))

    # -- afterwards

    def cost(self, sizes: Mapping[str, float]) -> int:
        """Numbers in a slice: ρ·(in + out) at each site; with widths, the MLPs' own weights too."""
        total = 0
        for p, c in self.parts.items():
            total += kept(sizes.get(p, 1.0), c.rank) * (c.A.shape[1] + c.B.shape[0])
        for p, (_, order, each) in self.mlps.items():
            total += kept(sizes.get(p, 1.0), len(order)) * each
        return total


def sorting(c: Components, inside: int) -> list[int]:
    """An order of components in which the first ``inside`` fall in ‖B_j‖‖A_j‖ and the others stay."""
    norms = c.B[:, :inside].norm(dim=0) * c.A[:inside].norm(dim=1)
    return [*norms.argsort(descending=True, stable=True).tolist(), *range(inside, c.rank)]


def hidden_units(model: nn.Module) -> dict[str, tuple[nn.Module, Tensor, int]]:
    """Of each MLP: the layer down, its inputs in descending order of Σ|W_down[:, j]|, and the weights of one unit."""
    found = {}
    for part in architecture.mlp_modules(model):
        W = site_at(model, part.layers["down"].path).weight().detach()
        order = W.float().abs().sum(0).argsort(descending=True, stable=True)
        found[part.path] = part.layers["down"].module, order, len(part.layers) * W.shape[0]
    return found


def _times(mask: Tensor) -> Callable[[nn.Module, tuple], tuple]:
    return lambda module, args: (args[0] * mask.to(args[0].dtype), *args[1:])


def _logits(outputs: Any) -> Tensor:
    return getattr(outputs, "logits", outputs)


def elastic_of(adapter: Adapter) -> Elastic:
    """The hook of an adapter that was trained so; raises UserError where there is none."""
    hook = next((h for h in adapter.hooks if isinstance(h, Elastic)), None)
    if hook is None:
        raise UserError(f"{adapter.recipe} was not trained to be cut: its recipe must hold elastic")
    return hook


def pick(
    adapter: Adapter, score: Callable[[], float], budget: int, samples: int = 64, seed: int = 0, **evolution: Any
) -> Sizes:
    """The slice of at most ``budget`` numbers (as ``Elastic.cost`` counts) that should score best; nothing is trained.

    ``score()`` measures the model as it runs then, higher being better: it is called on ``samples`` random slices, a
    linear model of it is fitted, and evolution looks for that model's best slice. Raises UserError when even the
    smallest slice is over the budget.
    """
    hook = elastic_of(adapter)
    choices, chance = hook.choices(), random.Random(seed)

    def fits(sizes: Sizes) -> bool:
        return hook.cost(sizes) <= budget

    least = {p: s[-1] for p, s in choices.items()}
    if not fits(least):
        raise UserError(f"the smallest slice has {hook.cost(least)} numbers, more than the budget of {budget}")
    points, scores = [draw(choices, fits, chance) for _ in range(samples)], []
    for sizes in points:
        with hook.at(sizes), torch.no_grad():
            scores.append(float(score()))
    return evolve(choices, ridge(points, scores, choices), fits, seed=seed, **evolution)


@torch.no_grad()
def cut(adapter: Adapter, sizes: Mapping[str, float]) -> dict[str, int]:
    """Make a slice real: smaller factors, sites without components taken off; gives the rank of each site left.

    Widths are of the base, which stays whole: ``Elastic.at`` runs them.
    """
    hook, empty = elastic_of(adapter), {}
    for path, c in hook.parts.items():
        n = kept(sizes.get(path, 1.0), c.rank)
        if n:
            c.delta.scale *= hook._gain(c.rank, n)
            c.prune(range(n))
        else:
            empty[path] = None
    if empty:
        adapter.rebuild(empty)
    hook.parts = components(adapter)
    return {path: c.rank for path, c in hook.parts.items()}
