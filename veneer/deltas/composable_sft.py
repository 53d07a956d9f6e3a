"""Composable sparse fine-tuning: sparse differences of the weights, found by a lottery ticket, that add up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.core.adapted import Base
from veneer.core.context import Context
from veneer.core.delta import Delta, LoRAForm, Slot
from veneer.core.hook import Phase, Plan, Ranks, Schedule
from veneer.core.registry import PeftMap, method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics import chance
from veneer.numerics.largest import largest

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter

TINY = 1e-7  # entries that end no further from the base are dropped, as in the official code


@method(
    "composable-sft",
    axis="delta",
    paper="arXiv:2110.07560",
    system=140,
    gives=("linear", "foldable", "frozen-base"),
    defaults="composable-sft-ranks",
)
class ComposableSFT(Delta):
    """Lottery-ticket sparse fine-tuning: train all, then from the base again the K entries that moved most.

    θ = θ⁰ + D with ‖D‖₀ ≤ K over all tensors together (Ansell et al. 2022, §3). Differences of several adapters on one
    model add up, which is their use: one for the language, one for the task.

    =========  ================  =========  ====================================
    tensor     shape             trained    when
    =========  ================  =========  ====================================
    D          (out·in + out,)   yes        in a dense phase, from 0
    v          (k,), Σk = K      yes        in a sparse phase, from 0
    indices    (k,) int          no         chosen after the dense phase
    =========  ================  =========  ====================================

    D holds the weight's entries row by row, then the bias's, if there is one. Phase 1 trains D; the K largest |D| are
    found over all selected layers; everything, heads that train beside it too, goes back to where it was; phase 2
    trains these K entries.
    ``iterations`` n repeat this with K/n more entries each and what was found before kept. ``select="random"`` draws
    the entries and has no phase 1. Heads and norms train densely with ``train=``; the paper freezes norms.

    Defaults: 1 % of the entries, one iteration and no L1, as the official library; its scripts take K = 14,155,776 for
    tasks (3 epochs, then 10, whence ``dense`` = 0.25) and 7,667,712 with both L1 coefficients 0.1 for languages; rate
    5e-5. The L1 term is λ/N·Σ|D| with N the model's parameters.

    Differences: only the chosen entries exist in phase 2, with two moments each, so AdamW's decay and old momentum
    cannot move others (the official code masks gradients, through which both pass). Exactly K are chosen, ties in
    order, zeros never; the threshold is found by bisection, not in a list of all |D|. The base stays as it is, and
    detaching restores it bit for bit. A linear layer makes W + D again in the backward pass, from x and what trains.
    """

    proportion: Annotated[float, At(gt=0, le=1, doc="K as a share of the entries of all tensors")] = 0.01
    entries: Annotated[int | None, At(ge=1, doc="K itself; overrides proportion")] = None
    select: Annotated[Literal["lottery", "random"], At(doc="the entries that move most, or any")] = "lottery"
    iterations: Annotated[int, At(ge=1, doc="rounds of both phases, each with K/n entries more")] = 1
    dense: Annotated[float, At(gt=0, lt=1, doc="share of the run's steps in dense phases")] = 0.25
    l1_dense: Annotated[float, At(ge=0, doc="λ of the L1 term in dense phases")] = 0.0
    l1_sparse: Annotated[float, At(ge=0, doc="λ of the L1 term in sparse phases")] = 0.0

    usual_rate = 5e-5
    peft = PeftMap("SUPERTUNING", keys={"v": "supertuning_values", "indices": "supertuning_indices"})
    reasons = {"as_lora": "a sparse difference has full rank"}

    def slots(self) -> Iterable[Slot]:
        if self._parameters.get("D") is not None:
            yield Slot("D", "sparse", (self.size,))
        elif self._parameters.get("v") is not None:
            yield Slot("v", "sparse", tuple(self.v.shape))

    def build(self) -> None:
        self.penalty = 0.0
        self.D = self.v = self.indices = None

    @property
    def size(self) -> int:
        """Entries of the weight and the bias."""
        s = self.site
        return s.out_features * s.in_features + (0 if s.bias() is None else s.out_features)

    def prepare(self, ctx: Context) -> None:
        """Add the L1 term to the loss of a training pass."""
        if self.penalty and ctx.training and (self.D is not None or self.v is not None):
            ctx.add_loss("composable-sft", self.penalty * (self.v if self.D is None else self.flat()).abs().sum())

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.D is None and self.v is None:
            return base(x)
        if self.site.kind != "linear":
            return super().forward(x, base)
        shape = self.site.out_features, self.site.in_features
        own = self.D, self.v, self.indices, self.size, shape, self.compute_dtype(x)
        W = base.source() if base.fusable and not base.links else None
        if isinstance(W, Tensor) and not W.requires_grad:
            return _Changed.apply(x, W, base.own_bias(), *own)
        return base(x) + _Changed.apply(x, None, None, *own)

    def update(self, x: Tensor) -> Tensor:
        W, b = self._split(*self.cast(x, self.flat()))
        return self.site.run(x, W, b)

    def flat(self) -> Tensor:
        """D (out·in + out,), fp32."""
        whole = torch.zeros(self.size, device=self.site_device()) if self.D is None else self.D
        return whole if self.v is None else whole.index_add(0, self.indices, self.v)

    def weight(self, W: Tensor | None = None) -> Tensor:
        return self._split(self.flat())[0]

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        D, change = self._split(self.flat())
        return W + D, b if change is None else b + change

    def _split(self, flat: Tensor) -> tuple[Tensor, Tensor | None]:
        return _split(flat, (self.site.out_features, self.site.in_features))

    def as_lora(self, W: Tensor, b: Tensor | None) -> LoRAForm | None:
        return None

    def parameter_count(self) -> int:
        """All entries in a dense phase, else k."""
        if self.D is not None:
            return self.size
        return 0 if self.indices is None else len(self.indices)

    def densify(self) -> None:
        """Let every entry train, from 0; what was chosen before stays and waits."""
        if self.v is not None:
            self.v.requires_grad_(False)
        self._take("D", torch.zeros(self.size), trained=True)

    def sparsify(self, more: Tensor) -> None:
        """Let the entries chosen before and these (flat positions) train, the new ones from 0."""
        old, values = (self.indices, self.v) if self.indices is not None else (more[:0], more[:0].float())
        order = torch.cat([old, more.to(old)]).sort()
        kind = torch.int32 if self.size < 2**31 else torch.int64
        values = torch.cat([values.detach(), values.new_zeros(len(more))])[order.indices]
        self._take("D", None)
        self._take("indices", order.values.to(kind) if len(order.values) else None)
        self._take("v", values if len(values) else None, trained=True)

    def drop_small(self) -> None:
        """Leave out entries that ended at the base."""
        if self.v is not None:
            kept = self.v.detach().abs() > TINY
            values, indices = self.v.detach()[kept], self.indices[kept]
            self._take("v", values if len(values) else None, trained=True)
            self._take("indices", indices if len(values) else None)

    def match(self, state: dict[str, Tensor]) -> None:
        """Have the tensors that a state holds."""
        for name in ("D", "v", "indices"):
            self._take(name, state.get(name), trained=name != "indices")
        if self.D is not None and self.v is not None:
            self.v.requires_grad_(False)

    def _take(self, name: str, value: Tensor | None, trained: bool = False) -> None:
        """Have a tensor, or none of that name."""
        self._parameters.pop(name, None), self._buffers.pop(name, None)
        self.__dict__[name] = None
        if value is not None:
            self.set_tensor(name, value.clone(), trained=trained)


@method("composable-sft-ranks", axis="ranks", paper="arXiv:2110.07560", system=140, defaults="composable-sft")
class ComposableSFTRanks(Ranks):
    """The phases of composable sparse fine-tuning: what trains, the choice of entries, the way back to the start.

    It comes with ``composable-sft`` and has no fields: those of the form say what it does.
    """

    def on_attach(self, adapter: Adapter) -> None:
        self.members = list(adapter.members())
        other = next((d for d in self.members if not isinstance(d, ComposableSFT)), None)
        if other is not None:
            raise UserError(f"composable-sft-ranks chooses entries for composable-sft, which {other.name} is not")
        self.form, self.heads = self.members[0], {}
        sizes = [d.size for d in self.members]
        self.budget = self.form.entries or max(1, round(self.form.proportion * sum(sizes)))
        if self.budget > sum(sizes):
            raise UserError(f"composable-sft: entries={self.budget}, but the selected tensors have only {sum(sizes)}")
        if self.form.select == "random":
            self._draw(sizes)
        elif adapter.phases[adapter.phase].name == "dense":
            for d in self.members:
                d.densify()

    def phases(self) -> list[Phase]:
        n, share = self.form.iterations, self.form.dense
        both = [Phase("dense", share / n), Phase("sparse", (1 - share) / n)]
        return [] if self.form.select == "random" else both * n

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        dense = adapter.phases[adapter.phase].name == "dense"
        if dense:
            self.heads = {path: d.parameter().detach().clone() for path, d in adapter.trained.items()}
        count = sum(p.numel() for n, p in adapter.model.named_parameters() if ".veneer." not in f".{n}")
        for d in self.members:
            d.penalty = (d.l1_dense if dense else d.l1_sparse) / count

    @torch.no_grad()
    def on_phase_end(self, phase: Phase) -> Plan | None:
        n, rounds = self.form.iterations, self.adapter.phase // 2 + 1
        if phase.name == "dense":
            for d in (d for d in self.members if d.indices is not None):
                d.D.index_fill_(0, d.indices.long(), 0.0)
            new = self.budget * rounds // n - self.budget * (rounds - 1) // n
            for d, chosen in zip(self.members, largest([d.D for d in self.members], new)):
                d.sparsify(chosen)
            for path, value in self.heads.items():
                self.adapter.trained[path].parameter().copy_(value)
        elif rounds < n and self.form.select == "lottery":
            for d in self.members:
                d.densify()
        return None

    def on_end(self) -> None:
        for d in self.members:
            d.drop_small()

    def state_dict(self) -> dict[str, Any]:
        return {"heads": dict(self.heads)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.heads = dict(state.get("heads", {}))

    def _draw(self, sizes: list[int]) -> None:
        """K positions out of all, each set as likely as any other."""
        draw = np.random.Generator(np.random.PCG64(chance.derived_seed(self.seed, "composable-sft")))
        counts = draw.multivariate_hypergeometric(sizes, self.budget, method="marginals")
        for d, size, count in zip(self.members, sizes, counts.tolist()):
            d.sparsify(torch.randperm(size, generator=d.generator("entries"))[:count].to(d.site_device()))


def _split(flat: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """The weight's entries (out, in) and the bias's (out,), or None."""
    n = shape[0] * shape[1]
    return flat[:n].view(shape), flat[n:] if len(flat) > n else None


class _Changed(torch.autograd.Function):
    """x(W + D)ᵀ + b, or xDᵀ without W; the sum is made in each pass and not kept between them."""

    @staticmethod
    def forward(ctx, x, W, b, D, v, indices, size, shape, dtype):
        ctx.save_for_backward(x, W, b, D, v, indices)
        ctx.facts = size, shape, dtype
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), *_summed(W, b, D, v, indices, *ctx.facts))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, W, b, D, v, indices = ctx.saved_tensors
        size, _, dtype = ctx.facts
        need_x, _, need_b, need_D, need_v = ctx.needs_input_grad[:5]
        with torch.autocast(x.device.type, enabled=False):
            grad_x = (grad @ _summed(W, b, D, v, indices, *ctx.facts)[0]).to(x.dtype) if need_x else None
            g = grad.reshape(-1, grad.shape[-1])
            grad_b = g.sum(0, dtype=torch.float32)
            G = (g.T @ x.reshape(-1, x.shape[-1]).to(dtype)).flatten()
            G = torch.cat([G.float(), grad_b])[:size]
            grad_D = G if need_D else None
            grad_v = G.index_select(0, indices) if need_v else None
        return grad_x, None, grad_b if need_b else None, grad_D, grad_v, None, None, None, None


def _summed(
    W: Any, b: Any, D: Any, v: Any, indices: Any, size: int, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """W + D (out, in) and the bias (out,), summed in fp32."""
    flat = torch.zeros(size, device=(v if D is None else D).device)
    for part, own in zip(_split(flat, shape), (W, b)):
        if own is not None:
            part.copy_(own)
    flat = flat if D is None else flat.add_(D)
    W, b = _split(flat if v is None else flat.index_add_(0, indices, v), shape)
    return W.to(dtype), None if b is None else b.to(dtype)
