"""Comp-LoRA: LoRA that cannot touch the principal directions of W."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor

from veneer.core.delta import Delta, Pair, Slot
from veneer.core.hook import Optim
from veneer.core.registry import method
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.chance import kaiming_uniform
from veneer.numerics.kept import Kept
from veneer.numerics.spectrum import energy_rank, frame, leave_out

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter

Side = Literal["both", "in", "out"]


@method(
    "comp-lora",
    axis="delta",
    paper="arXiv:2501.15040",
    system=85,
    gives=("pair", "components", "linear", "foldable", "frozen-base"),
)
class CompLoRA(Delta):
    """LoRA in the orthogonal complement of the leading singular directions of W, which so survive as they are.

    ΔW = s·(I − U_kU_kᵀ)·B·A·(I − V_kV_kᵀ) with W = UΣVᵀ and s = α/r, so (W + ΔW)vᵢ = σᵢuᵢ and (W + ΔW)ᵀuᵢ = σᵢvᵢ for
    i ≤ k (Wang et al. 2025).

    ======  =========  =========  ===============================================
    tensor  shape      trained    start
    ======  =========  =========  ===============================================
    A       (r, in)    yes        U(−1/√in, 1/√in)
    B       (out, r)   yes        0
    U       (out, k)   no         the leading left singular vectors
    V       (in, k)    no         the leading right ones
    ======  =========  =========  ===============================================

    k is the fewest directions with a share ``energy`` of Σσ², or given, and leaves at least r of min(out, in) free.
    Defaults: r = 8, α = r as LoRA here; the CLIP recipe that the paper builds on has r = 2, α = 1, dropout 0.25 and
    rate 2e-4. energy = 0.9 is ours: the paper's operator and its k could not be had, only the principle; this is its
    plainest reading. ``side`` protects inputs (V) or outputs (U) alone. ``mode="start"`` only starts A in the
    complement, a weak baseline; ``comp-lora-steps`` beside plain ``lora`` projects after every step in place of every
    forward.

    A and B are projected, not x and y: 4rk(in + out) operations a forward instead of a token, in fp32, and the
    fused product does the rest. What is exported or folded is the projected pair, plain LoRA of rank r; the file holds
    A and B, and U and V are found in W again. Only the layer is protected, on inputs in the span of V; what the model
    says is not. A start that lies in the protected directions, as PiSSA's, is refused.
    """

    rank: Annotated[int, At(ge=1, doc="inner dimension r")] = 8
    alpha: Annotated[float | None, At(gt=0, doc="numerator of the scale s; the rank when None")] = None
    dropout: Annotated[float, At(ge=0, lt=1, doc="probability, on x, in training only")] = 0.0
    energy: Annotated[float, At(ge=0, le=1, doc="share of Σσ² in the protected directions")] = 0.9
    k: Annotated[int | None, At(ge=0, doc="protected directions, in place of energy")] = None
    side: Annotated[Side, At(doc="what is protected: inputs, outputs or both")] = "both"
    mode: Annotated[Literal["forward", "start"], At(doc="project in every forward, or A at the start")] = "forward"

    def slots(self) -> Iterable[Slot]:
        yield Slot("A", "factor_a", (self.rank, self.site.in_features), kaiming_uniform)
        yield Slot("B", "factor_b", (self.site.out_features, self.rank))

    def build(self) -> None:
        self.scale = (self.rank if self.alpha is None else self.alpha) / self.rank
        self._kept = Kept()
        U, V = protected(self.site.weight(), self.rank, self.energy, self.k, self.side)
        if self.mode == "start":
            self.set_tensor("A", leave_out(self.A.detach(), V), trained=True)
            return
        self.set_tensor("U", U)
        self.set_tensor("V", V)
        self.rebuilt |= {"U", "V"}

    def fill(self, start: dict[str, Tensor]) -> None:
        super().fill(start)
        A = self.A.detach()
        if "factor_a" in start and self.mode == "forward" and leave_out(A, self.V).norm() < 1e-3 * A.norm():
            raise UserError(
                f"comp-lora: this start lies in the directions of {self.site.path} that are protected, so nothing of "
                "it is left; leave the init out, or protect less with a smaller energy"
            )

    def pair(self) -> Pair:
        """A and B in the complement."""
        if self.mode == "start":
            return Pair(self.gated(self.A), self.B, self.scale)
        trained = (self.A, self.B) if self.gate is None else (self.A, self.B, self.gate)
        return Pair(*self._kept(self._projected, trained, (self.U, self.V)), self.scale)

    def _projected(self) -> tuple[Tensor, Tensor]:
        return leave_out(self.gated(self.A), self.V), leave_out(self.B.mT, self.U).mT

    def is_plain(self) -> bool:
        """It is; asking must not project."""
        return True

    def parameter_count(self) -> int:
        """r·(in + out), and r for gates."""
        gates = 0 if self.gate is None else self.rank
        return self.rank * (self.site.in_features + self.site.out_features) + gates


def protected(W: Tensor, rank: int, energy: float, k: int | None, side: Side) -> tuple[Tensor, Tensor]:
    """U_k (out, k) and V_k (in, k) of W; no columns on a side that is not protected."""
    U, S, Vh = frame(W)
    k = min(energy_rank(S, energy) if k is None else k, max(0, len(S) - rank))
    return U[:, : k if side != "in" else 0], Vh[: k if side != "out" else 0].mT.contiguous()


@torch.no_grad()
def project_to_complement(
    adapter: Adapter, energy: float = 0.9, k: int | None = None, side: Side = "both"
) -> dict[str, float]:
    """Take out of a trained adapter's pairs what touches the principal directions of W, in place.

    Works on every form that is a plain pair; ``energy``, ``k`` and ``side`` as in `CompLoRA`. Returns the share of
    ‖ΔW‖² that is left at each site, by path. Raises UserError for a start that moved part of W into the pairs.
    """
    left: dict[str, float] = {}
    _refuse_offsets(adapter, "project_to_complement")
    for site, A, B, _ in adapter.pairs():
        before = (B @ A).square().sum()
        _take_out(A, B, *protected(site.weight(), A.shape[0], energy, k, side))
        left[site.path] = float((B @ A).square().sum() / before.clamp_min(torch.finfo(before.dtype).tiny))
    return left


def _refuse_offsets(adapter: Adapter, who: str) -> None:
    if any(d.offset is not None for d in adapter.members()):
        raise UserError(f"{who}: the init of {adapter.recipe} moved a part of W into the factors; project without it")


def _take_out(A: Tensor, B: Tensor, U: Tensor, V: Tensor) -> None:
    A.copy_(leave_out(A, V))
    B.copy_(leave_out(B.mT, U).mT)


@method("comp-lora-steps", axis="optim", paper="arXiv:2501.15040", system=85, wants=("pair",), defaults="lora")
class CompLoRASteps(Optim):
    """Keep plain pairs in the complement of W's principal directions by projecting them after every step.

    A ← A(I − V_kV_kᵀ), B ← (I − U_kU_kᵀ)B at the start and after each optimiser step: projected gradient descent, where
    ``comp-lora`` differentiates through the projection. Under plain gradient descent both move alike; under Adam they
    differ, as its step leaves the complement before it is projected. The forward is plain LoRA's, and so is the file.
    Nothing else trains; fields as in ``comp-lora``.
    """

    energy: Annotated[float, At(ge=0, le=1, doc="share of Σσ² in the protected directions")] = 0.9
    k: Annotated[int | None, At(ge=0, doc="protected directions, in place of energy")] = None
    side: Annotated[Side, At(doc="what is protected: inputs, outputs or both")] = "both"

    def on_attach(self, adapter: Adapter) -> None:
        _refuse_offsets(adapter, self.name)
        self.frames: list[tuple[Site, Any, Any]] = []
        for site, A, _, _ in adapter.pairs():
            self.frames.append((site, *protected(site.weight(), A.shape[0], self.energy, self.k, self.side)))
        self.after_step(-1)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for (_, A, B, _), (_, U, V) in zip(self.adapter.pairs(), self.frames, strict=True):
            _take_out(A, B, U.to(A.device), V.to(A.device))
