"""MoSA: one adapter trained as several sparse ones that share no entry, one drawn for each step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.adapted import Base
from veneer.core.context import current
from veneer.core.delta import Delta, LoRAForm, Pair, Slot
from veneer.core.hook import Objective, Run
from veneer.core.registry import method
from veneer.core.site import Site, module_site
from veneer.errors import UserError
from veneer.fields import At
from veneer.models import architecture
from veneer.numerics import chance

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class Sparse(Delta):
    """What both forms share: matrices whose entries belong to N modules, and the draw of one of them.

    Of a split matrix M each module i owns the entries at every N-th part of a random permutation, as a vector of its
    own, and M_i is the start with those entries moved. One module is drawn for each block and forward pass in training,
    as a function of the seed and the pass, so that a recomputed block draws the same; in eval mode the merged matrix
    acts, which is the mean of the M_i.
    """

    modules: Annotated[int, At(ge=1, doc="N, the sparse modules that the adapter is split into")] = 4

    def slots_of(self, name: str, shape: tuple[int, int], start: Any, split: bool, bias: bool) -> Iterable[Slot]:
        """The tensors of one matrix (a, b) and, where it has one, of its bias (a,)."""
        role, n = ("factor_a" if name in "AD" else "factor_b"), self.modules
        if not split:
            yield Slot(name, role, shape, start)
        elif start is not chance.zeros:
            yield Slot(f"{name}_start", role, shape, start, trained=False)
        parts = torch.arange(shape[0] * shape[1]).tensor_split(n) if split else ()
        yield from (Slot(f"{name}{i}", "sparse", (len(part),)) for i, part in enumerate(parts))
        names = [f"b_{name}{i}" for i in range(n)] if split else [f"b_{name}"]
        yield from (Slot(own, "bias", shape[:1]) for own in names if bias)

    def build_places(self, name: str, shape: tuple[int, int]) -> None:
        """Deal the entries of a split matrix out to the modules."""
        order = torch.randperm(shape[0] * shape[1], generator=self.generator("entries", name))
        self.set_tensor(f"{name}_places", order.argsort().to(torch.int32))  # entry → its place among the modules'
        self.rebuilt.add(f"{name}_places")

    def matrix(self, name: str, shape: tuple[int, int], drawn: int | None) -> Tensor:
        """The matrix of the drawn module, or the merged one, in fp32."""
        if name in self._parameters:
            return getattr(self, name)
        values = [getattr(self, f"{name}{i}") for i in range(self.modules)]
        shares = [1 / self.modules if drawn is None else float(i == drawn) for i in range(self.modules)]
        dealt = torch.cat([v * share for v, share in zip(values, shares)])
        M = dealt[getattr(self, f"{name}_places")].view(shape)
        start = getattr(self, f"{name}_start", None)
        return M if start is None else start + M

    def bias(self, name: str, drawn: int | None) -> Tensor:
        """The bias of the drawn module, or the mean of all."""
        if f"b_{name}" in self._parameters:
            return getattr(self, f"b_{name}")
        every = torch.stack([getattr(self, f"b_{name}{i}") for i in range(self.modules)])
        return every.mean(0) if drawn is None else (every * F.one_hot(torch.tensor(drawn), len(every))[:, None]).sum(0)

    def draw(self) -> int | None:
        """The module of this pass; None in eval mode: the merged one."""
        if not self.training:
            return None
        ctx, where = current(), self.site.path if self.site.block is None else self.site.block
        drawn = chance.derived_seed(self.seed, "module", where, 0 if ctx is None else ctx.draw) % self.modules
        self.__dict__.setdefault("drawn", set()).add(drawn)
        return drawn

    def rest(self) -> None:
        """Take the gradients of the modules that were not drawn since the last call."""
        drawn = self.__dict__.pop("drawn", set())
        for name, p in self._parameters.items():
            owner = name.lstrip("ABDU_b")
            if owner.isdigit() and int(owner) not in drawn:
                p.grad = None


@method("mosa", axis="delta", paper="arXiv:2312.02923", system=96, gives=("frozen-base",), defaults="mosa-consistency")
class MoSA(Sparse):
    """An adapter beside each MLP, trained as N sparse modules without a common entry and merged to one.

    y′ = y + c·(drop(GELU(LN(x)Dᵀ + b_D))·U_iᵀ + b_Ui) with x the MLP's input, y its output and i drawn anew for every
    block and training pass; in eval mode U = (1/N)·ΣU_i and b_U = (1/N)·Σb_Ui, the expectation over the draws (Zhang
    et al. 2023, Mixture of Sparse Adapters). U_i is zero off module i's entries.

    ===========  =============  ==========  ===================================
    tensor       shape          trained     start
    ===========  =============  ==========  ===================================
    D            (m, d)         yes         U(−1/√d, 1/√d)
    b_D          (m,)           yes         0
    U0 … UN−1    (d·m/N,) each  when drawn  0; the entries of U_i
    b_U0 …       (d,) each      when drawn  0
    gain, shift  (d,)           yes         1, 0: a layer norm of its own
    U_places     (d·m,) int     no          whose each entry is, from the seed
    ===========  =============  ==========  ===================================

    ``share="up"`` splits D and b_D in place of U, ``"none"`` both; a split D moves from a frozen start. The official
    code has m = 64, N = 4, c = 0.1, dropout 0.1, U split, rates of 5e-4 to 5e-3 and a decay of 0.01. There are two
    passes a step for the consistency, see ``mosa-consistency``, which also lets modules that were not drawn rest.

    The official code holds N dense copies of U with masked gradients; here each entry exists once, in the module that
    owns it, and training is the same. Its norm sees the residual stream ahead of the MLP's own norm, ours the MLP's
    input: they differ by that norm's gains. ``placement="layer"`` puts one beside each selected linear layer.
    """

    rank: Annotated[int, At(ge=1, doc="width m of the bottleneck")] = 64
    share: Annotated[Literal["down", "up", "none"], At(doc="which matrix all modules share")] = "down"
    scaling: Annotated[float, At(gt=0, doc="c")] = 0.1
    dropout: Annotated[float, At(ge=0, lt=1, doc="probability, in the middle, in training only")] = 0.1
    activation: Annotated[Literal["gelu", "relu", "silu"], At(doc="the non-linearity")] = "gelu"
    norm: Annotated[bool, At(doc="a trained layer norm before D")] = True
    placement: Annotated[Literal["parallel", "layer"], At(doc="beside each MLP, or each selected linear layer")] = (
        "parallel"
    )

    layers = ("linear", "module")
    folds = False
    deterministic = False
    reasons = {
        "folds": "the bottleneck is not linear",
        "as_lora": "the bottleneck is not linear",
        "deterministic": "a module is drawn for every training pass",
    }

    @classmethod
    def places(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any]) -> list[Site]:
        """The MLPs of the blocks with a selected layer, or the selected linear layers."""
        if fields["placement"] == "layer":
            return [s for s in sites if s.kind == "linear" and s.rows is None]
        blocks = [f"{path}." for path, _ in architecture.blocks(model) if any(f"{path}." in s.path for s in sites)]
        parts = [p for p in architecture.mlp_modules(model) if p.path.startswith(tuple(blocks))]
        if not parts:
            raise UserError(
                "mosa: the selected layers lie in no block whose MLP is a module of its own; placement='layer' puts "
                "one beside each selected linear layer"
            )
        return [module_site(model, p.path, {r: inner.module for r, inner in p.layers.items()}) for p in parts]

    def slots(self) -> Iterable[Slot]:
        m, inner, outer = self._sizes()
        yield from self.slots_of("D", (m, inner), chance.kaiming_uniform, self.share != "down", True)
        yield from self.slots_of("U", (outer, m), chance.zeros, self.share != "up", True)
        if self.norm:
            yield Slot("gain", "magnitude", (inner,), chance.ones)
            yield Slot("shift", "bias", (inner,))

    def build(self) -> None:
        m, inner, outer = self._sizes()
        for name, shape, shared in (("D", (m, inner), "down"), ("U", (outer, m), "up")):
            if self.share != shared:
                self.build_places(name, shape)

    def forward(self, x: Tensor | None, base: Base, *args: Any, **kwargs: Any) -> Any:
        out = base(x, *args, **kwargs)
        y = out if isinstance(out, Tensor) else out[0]
        h = x if x is not None else next(iter(kwargs.values()))
        y = y + self._branch(h, self.draw())
        return y if isinstance(out, Tensor) else (y, *out[1:])

    def _branch(self, h: Tensor, drawn: int | None) -> Tensor:
        """What is added, with the drawn module or (None) the merged one."""
        m, inner, outer = self._sizes()
        D, U = self.matrix("D", (m, inner), drawn), self.matrix("U", (outer, m), drawn)
        D, b_D, U, b_U = self.cast(h, D, self.bias("D", drawn), U * self.scaling, self.bias("U", drawn) * self.scaling)
        if self.norm:
            h = F.layer_norm(h, (inner,), self.gain.to(h.dtype), self.shift.to(h.dtype))
        return F.linear(self.drop(ACTIVATIONS[self.activation](F.linear(h, D, b_D))), U, b_U)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise UserError(f"mosa cannot fold: {self.reasons['folds']}")

    def as_lora(self, W: Tensor, b: Tensor | None) -> LoRAForm | None:
        return None

    def parameter_count(self) -> int:
        """m·(d_in + d_out), the biases m and d_out, those of split matrices N times, and 2·d_in for the norm."""
        m, inner, outer = self._sizes()
        b_D, b_U = (self.modules if self.share != s else 1 for s in ("down", "up"))
        return m * (inner + outer) + b_D * m + b_U * outer + (2 * inner if self.norm else 0)

    def _sizes(self) -> tuple[int, int, int]:
        """(m, d of what comes in, d of what goes out)."""
        site = self.site
        if site.kind == "module":
            return self.rank, site.parts["up"].in_features, site.parts["down"].out_features
        return self.rank, site.in_features, site.out_features


@method(
    "mosl",
    axis="delta",
    paper="arXiv:2312.02923",
    system=96,
    gives=("linear", "foldable", "frozen-base"),
    defaults="mosa-consistency",
)
class MoSL(Sparse):
    """MoSA's split on LoRA: A is shared, B trained as N sparse modules and merged to one.

    y = xWᵀ + b + c·xAᵀB_iᵀ with i drawn anew for every block and training pass; in eval mode, folded and exported
    B = (1/N)·ΣB_i, which is ordinary LoRA.

    ===========  ===============  ==========  ================================
    tensor       shape            trained     start
    ===========  ===============  ==========  ================================
    A            (r, in)          yes         U(−1/√in, 1/√in)
    B0 … BN−1    (out·r/N,) each  when drawn  0; the entries of B_i
    B_places     (out·r,) int     no          whose each entry is, from the seed
    ===========  ===============  ==========  ================================

    Defaults are the official code's: r = 16, c = 1, N = 4, on the query and value projections. Its dropout acts between
    A and B, here on x, as LoRA's.
    """

    rank: Annotated[int, At(ge=1, doc="inner dimension r")] = 16
    scaling: Annotated[float, At(gt=0, doc="c")] = 1.0
    dropout: Annotated[float, At(ge=0, lt=1, doc="probability, on x, in training only")] = 0.0

    usual_sites = ("q", "v")
    deterministic = False
    reasons = {"deterministic": "a module is drawn for every training pass"}

    def slots(self) -> Iterable[Slot]:
        yield Slot("A", "factor_a", (self.rank, self.site.in_features), chance.kaiming_uniform)
        yield from self.slots_of("B", (self.site.out_features, self.rank), chance.zeros, True, False)

    def build(self) -> None:
        self.scale = self.scaling
        self.build_places("B", (self.site.out_features, self.rank))

    def pair(self) -> Pair:
        """The pair of this pass: with the drawn module in training, else merged."""
        return self._pair(self.draw())

    def _pair(self, drawn: int | None) -> Pair:
        return Pair(self.A, self.matrix("B", (self.site.out_features, self.rank), drawn), self.scale)

    def weight(self, W: Tensor | None = None) -> Tensor:
        A, B, s = self._pair(None)
        return s * B @ A

    def as_lora(self, W: Tensor, b: Tensor | None) -> LoRAForm:
        return LoRAForm(*self._pair(None))

    def parameter_count(self) -> int:
        """r·(in + out)."""
        return self.rank * (self.site.in_features + self.site.out_features)


def consistency(first: Tensor, second: Tensor) -> Tensor:
    """½·[KL(p₂ ‖ p₁) + KL(p₁ ‖ p₂)] of logits (n, C), the mean over n; the first argument of each KL is held fixed."""
    p, q = first.log_softmax(1), second.log_softmax(1)
    return 0.5 * sum((b.exp() * (b - a)).sum(1).mean() for a, b in ((p, q.detach()), (q, p.detach())))


@method("mosa-consistency", axis="objective", paper="arXiv:2312.02923", system=96, defaults="mosa")
class MoSAConsistency(Objective):
    """Two draws on the same batch should say the same: λ_r·½[KL(p₂ ‖ p₁) + KL(p₁ ‖ p₂)] (Zhang et al. 2023).

    p₁, p₂ are the outputs of two passes with modules drawn anew, of a classifier or at the labelled positions of a
    language model; the task's loss is that of the first, plus λ_a times that of the second. It also takes the zero
    gradients of modules that no pass drew away, so that neither momentum nor decay moves them, as where every module is
    a copy of its own. Defaults: λ_r = 1, λ_a = 0, of the official code; with both 0 there is no second pass.
    """

    weight: Annotated[float, At(ge=0, doc="λ_r, on the consistency")] = 1.0
    second: Annotated[float, At(ge=0, doc="λ_a, on the task's loss of the second pass")] = 0.0

    def loss(self, outputs: Any, batch: Any, run: Run) -> Tensor | None:
        if not (self.weight or self.second):
            return None
        other, labels = run(batch), batch["labels"]
        if outputs.logits.ndim == 3:  # the position before a label says it
            labels = labels[:, 1:]
            keep = labels != -100
            first, then, labels = (t[keep] for t in (outputs.logits[:, :-1], other.logits[:, :-1], labels))
        else:
            first, then = outputs.logits, other.logits
        total = self.weight * consistency(first.float(), then.float())
        return total + self.second * F.cross_entropy(then.float(), labels) if self.second else total

    def before_optimizer(self, step: int) -> None:
        for delta in self.adapter.members():
            if isinstance(delta, Sparse):
                delta.rest()
