"""LoRA-Pro: steps on A and B that move W along the nearest thing to its own gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from veneer.core.hook import Optim
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.products import product
from veneer.parts.whole_gradients import loss_of

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter
    from veneer.core.site import Site

Split = Literal["sylvester", "symmetry", "zero"]
RIDGE = 1e-8
TILE = 2**19  # entries of W that go through the moments together, so that they stay in the cache


class Solves:
    """What the adjustments of pairs of one shape share, A (…, r, in) and B (…, out, r): bases of what they span.

    With BᵀB = U·diag(b)·Uᵀ and AAᵀ = V·diag(a)·Vᵀ the bases are Q_B = B·U·b^-½ (…, out, r) and Q_A = a^-½·VᵀA
    (…, r, in). Everything large is a product with an orthonormal side, which fp32 is enough for; Gram matrices, their
    decompositions and the bases are computed in fp64. Eigenvalues are ridged by 1e-8 of their mean before they divide,
    and 1/0 is 0, so that while B = 0 only B moves.
    """

    def __init__(self, A: Tensor, B: Tensor, scale: float) -> None:
        self.scale = scale
        wide_a, wide_b = A.double(), B.double()
        self.values_a, turn_a = _unit(wide_a @ wide_a.mT)
        self.values_b, turn_b = _unit(wide_b.mT @ wide_b)
        self.rows, self.columns = (turn_a.mT @ wide_a).to(A.dtype), (wide_b @ turn_b).to(B.dtype)
        self.turn_a, self.turn_b = turn_a.to(A.dtype), turn_b.to(B.dtype)

    def seen(self, grad_A: Tensor | None, grad_B: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """(Q_Bᵀg, g·Q_Aᵀ), (…, r, in) and (…, out, r), from the factors' own gradients; of a frozen factor None."""
        turn_a, turn_b = self.turn_a / self.scale, self.turn_b / self.scale
        return None if grad_A is None else turn_b.mT @ grad_A, None if grad_B is None else grad_B @ turn_a

    def equivalent(self, low: Tensor | None, high: Tensor | None) -> tuple[Tensor, Tensor]:
        """Two factors (…, out, k) and (…, k, in) of g̃ = P_B g + g P_A − P_B g P_A, from what `seen` gives."""
        if low is None or high is None:
            return (high, self.rows) if low is None else (self.columns, low)
        rest = low - (self.columns.mT @ high) @ self.rows
        return torch.cat((self.columns, high), -1), torch.cat((rest, self.rows), -2)

    def moves(self, low: Tensor | None, high: Tensor | None, split: Split) -> tuple[Tensor | None, Tensor | None]:
        """(h_A, h_B), shaped as A and B, from what `seen` gives; of a frozen factor None.

        What both sides see, c = Q_Bᵀ g Q_Aᵀ, is shared out by ``split``: of c_ij A takes a_j/(b_i + a_j), or half, or
        none, and B the rest.
        """
        if low is not None and high is not None:
            both = self.columns.mT @ high
            taken = both * self._share(split).to(both)
            low = low - taken @ self.rows
            high = high - self.columns @ (both - taken)
        turn_a, turn_b = self.turn_a / self.scale, self.turn_b / self.scale
        return None if low is None else turn_b @ low, None if high is None else high @ turn_a.mT

    def _share(self, split: Split) -> Tensor:
        if split != "sylvester":
            return torch.tensor(0.5 if split == "symmetry" else 0.0)
        a, b = self.values_a.unsqueeze(-2), self.values_b.unsqueeze(-1)
        return a / (a + b).clamp_min(torch.finfo(a.dtype).tiny)


def _unit(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (…, r) ≥ 0 of a Gram matrix (…, r, r) in fp64, and its eigenvectors over their roots."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0)
    ridged = values + RIDGE * values.mean(-1, keepdim=True)
    return values, vectors * torch.where(ridged > 0, ridged.rsqrt(), 0.0).unsqueeze(-2)


def adjusted(
    A: Tensor, B: Tensor, grad_A: Tensor | None, grad_B: Tensor | None, scale: float, split: Split = "sylvester"
) -> tuple[Tensor | None, Tensor | None]:
    """(h_A, h_B) of one pair A (r, in), B (out, r), or of a stack of pairs; of a frozen factor None.

    Their equivalent gradient s·(B h_A + h_B A) is nearest to ∂L/∂W.
    """
    solved = Solves(A, B, scale)
    return solved.moves(*solved.seen(grad_A, grad_B), split)


@method("lora-pro", axis="optim", paper="arXiv:2407.18242", system=26, wants=("pair",), defaults="lora")
class LoRAPro(Optim):
    """Plain LoRA whose steps imitate full fine-tuning (Wang et al. 2024).

    With g = ∂L/∂W never formed, g_A = s·Bᵀg and g_B = s·gAᵀ, the (h_A, h_B) that minimise ‖s·B h_A + s·h_B A − g‖_F are
    h_A = (BᵀB)⁻¹g_A/s² + XA and h_B = (I − P_B) g_B (AAᵀ)⁻¹/s² − BX, with P_B = B(BᵀB)⁻¹Bᵀ and any X (r, r). ``split``:
    the X nearest to LoRA's own step, BᵀBX + XAAᵀ = −(BᵀB)⁻¹g_A Aᵀ/s²; the ``symmetry`` of the shared part; or ``zero``.

    ``mode="full"``, the official one: e = g̃ with X = 0 feeds Adam's moments m, v **of the shape of W**, and the
    normalised step n takes the gradient's place in a second adjustment; A ← A − η·h_A, B ← B − η·h_B. So η is on the
    scale of full fine-tuning (official 2e-5 with r = 8, s = 2). ``mode="efficient"``: h stands for the gradient in the
    run's own AdamW; moments are LoRA's.

    ===========  ============  ==========================================================
    state        shape         where
    ===========  ============  ==========================================================
    m, v         (out·in,)     with B; full mode: as much as full fine-tuning of W keeps
    ===========  ============  ==========================================================

    Defaults: β = (0.9, 0.999), ε = 1e-8, official. The file is plain LoRA's. What is no plain pair (heads, biases) gets
    AdamW. Gates on the pairs are refused: they are no part of the identity.

    Differences from the official code: s is the layer's (there 2 for every layer), pairs are those of a layer (there
    neighbours in a list), the ridge of an inverse is relative, moments are fp32 and not bf16, decay is decoupled.
    The gradients are adjusted after clipping and after the mean over replicas.
    """

    mode: Annotated[Literal["full", "efficient"], At(doc="moments of W's shape, or of the factors'")] = "full"
    split: Annotated[Split, At(doc="how A and B share what both can do")] = "sylvester"
    beta1: Annotated[float, At(ge=0, lt=1, doc="decay of the first moment, full mode")] = 0.9
    beta2: Annotated[float, At(ge=0, lt=1, doc="decay of the second moment, full mode")] = 0.999
    eps: Annotated[float, At(gt=0, doc="added to the root of the second moment, full mode")] = 1e-8

    @property
    def usual_rate(self) -> float | None:
        """2e-5 in full mode, which steps like full fine-tuning."""
        return 2e-5 if self.mode == "full" else None

    def on_attach(self, adapter: Adapter) -> None:
        if not any(True for _ in adapter.pairs()):
            raise UserError(f"lora-pro adjusts plain pairs of factors, and gates leave none in {adapter.recipe}")

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | None:
        return WeightSpaceAdam(groups, self) if self.mode == "full" else None

    @torch.no_grad()
    def before_optimizer(self, step: int) -> None:
        """Efficient mode: put h in the gradients' place."""
        if self.mode == "full":
            return
        for kind, pairs in alike(self.adapter.pairs()).items():
            solved = solves(pairs, kind.scale)
            h_A, h_B = solved.moves(*solved.seen(*gradients(pairs)), self.split)
            for n, (A, B) in enumerate(pairs):
                A.grad, B.grad = (None if h is None else h[n] for h in (h_A, h_B))


Pairs = list[tuple[nn.Parameter, nn.Parameter]]


class Kind(NamedTuple):
    """What pairs that are solved together have in common."""

    shapes: tuple[torch.Size, torch.Size]
    scale: float
    trains: tuple[bool, bool]
    device: torch.device


def alike(pairs: Iterable[tuple[Site, nn.Parameter, nn.Parameter, float]]) -> dict[Kind, Pairs]:
    """The pairs with a gradient, those together that can be solved together."""
    found: dict[Kind, Pairs] = {}
    for _, A, B, scale in pairs:
        trains = A.grad is not None, B.grad is not None
        if any(trains):
            found.setdefault(Kind((A.shape, B.shape), scale, trains, A.device), []).append((A, B))
    return found


def solves(pairs: Pairs, scale: float) -> Solves:
    """Of some pairs that are alike."""
    return Solves(*(torch.stack(factors) for factors in zip(*pairs)), scale)


def gradients(pairs: Pairs) -> tuple[Tensor | None, Tensor | None]:
    """Those of A (n, r, in) and of B (n, out, r); None where they do not train."""
    stacks = [[p.grad for p in factors] for factors in zip(*pairs)]
    return tuple(None if None in grads else torch.stack(grads) for grads in stacks)


class WeightSpaceAdam(torch.optim.AdamW):
    """Adam whose moments of a pair live in W's space; AdamW for every other tensor."""

    def __init__(self, groups: list[dict[str, Any]], method: LoRAPro) -> None:
        super().__init__(groups, betas=(method.beta1, method.beta2), eps=method.eps, weight_decay=0.0)
        self.method = method

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the gradients stay as they were."""
        loss = loss_of(closure)
        groups = {p: group for group in self.param_groups for p in group["params"]}
        taken: list[tuple[nn.Parameter, Tensor]] = []
        for p in (p for _, *pair, _ in self.method.adapter.pairs() for p in pair):
            if p not in groups and p.grad is not None:
                taken.append((p, p.grad))
                p.grad = None  # another's to step
        for kind, pairs in alike(self.method.adapter.pairs()).items():
            self._step_pairs(kind, pairs, groups)
            taken += [(p, p.grad) for pair in pairs for p in pair if p.grad is not None]
        for p, _ in taken:
            p.grad = None
        super().step()
        for p, grad in taken:
            p.grad = grad
        return loss

    def _step_pairs(self, kind: Kind, pairs: Pairs, groups: dict[nn.Parameter, dict[str, Any]]) -> None:
        solved, grads = solves(pairs, kind.scale), gradients(pairs)
        lefts, rights = solved.equivalent(*solved.seen(*grads))
        again = tuple(None if g is None else torch.zeros_like(g) for g in grads)
        for n, (A, B) in enumerate(pairs):
            group, state = self._owned(A, B, lefts.shape[-2] * rights.shape[-1], groups)
            bases = solved.rows[n], solved.columns[n]
            tiled(lefts[n], rights[n], bases, state, group, *(None if g is None else g[n] for g in again))
        for factors, moves in zip(zip(*pairs), solved.moves(*again, self.method.split)):
            for p, h in zip(factors, () if moves is None else moves):
                p.mul_(1 - groups[p]["lr"] * groups[p]["weight_decay"]).sub_(h, alpha=groups[p]["lr"])

    def _owned(self, A: nn.Parameter, B: nn.Parameter, size: int, groups: dict) -> tuple[dict[str, Any], dict]:
        """The group and the state of a pair, which are B's where it trains."""
        owner = B if B in groups and B.grad is not None else A
        state = self.state[owner]
        if not state:
            state["step"] = torch.zeros((), device=A.device)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros(size, device=A.device) for _ in range(2))
        return groups[owner], state


def tiled(
    left: Tensor,
    right: Tensor,
    bases: tuple[Tensor, Tensor],
    state: dict[str, Tensor],
    group: dict[str, Any],
    low: Tensor | None,
    high: Tensor | None,
) -> None:
    """Adam's normalised step n for the gradient left @ right, as the bases see it: low += Q_Bᵀn, high = n·Q_Aᵀ.

    Rows of W go through it a tile at a time, so that what is of W's size, but for the moments, stays in the cache.
    """
    out, inn = left.shape[0], right.shape[1]
    height = -(-out // -(-out * inn // TILE))
    moments, before = [state[k].view(out, inn) for k in ("exp_avg", "exp_avg_sq")], state["step"].clone()
    for at in range(0, out, height):
        tile = slice(at, at + height)
        state["step"].copy_(before)
        n = normalised(product(left[tile], right.mT), [m[tile] for m in moments], state["step"], group)
        if low is not None:
            low += product(bases[1][tile].mT, n.mT)
        if high is not None:
            high[tile] = product(n, bases[0])


def normalised(e: Tensor, moments: list[Tensor], step: Tensor, group: dict[str, Any]) -> Tensor:
    """Adam's normalised step n for the gradient e; ``step`` counts on.

    It is where torch's own step takes a 0 at rate −1; that goes through the moments once.
    """
    beta1, beta2 = group["betas"]
    n = torch.zeros_like(e)
    adam(
        [n],
        [e],
        [moments[0]],
        [moments[1]],
        [],
        [step],
        fused=e.device.type in ("cpu", "cuda"),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=-1.0,
        weight_decay=0.0,
        eps=group["eps"],
        maximize=False,
    )
    return n
