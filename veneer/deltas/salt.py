"""SALT: scale and shift the leading singular values of W, and mix the others by a low-rank block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from torch import Tensor

from veneer.core.context import Context
from veneer.core.delta import Delta, LoRAForm, Pair, Slot
from veneer.core.registry import method
from veneer.fields import At
from veneer.numerics.kept import Kept
from veneer.numerics.spectrum import distinct, frame


@method("salt", axis="delta", paper="arXiv:2503.16055", system=19, gives=("linear", "foldable", "frozen-base"))
class SALT(Delta):
    """Singular-value tuning where W is strong, LoRA where it is weak, both in the frame of its singular vectors.

    W = U·diag(σ)·Vᵀ, W′ = U·C·Vᵀ with C = blockdiag(diag((1 + a)∘σ_{1:k} + b), diag(σ_{k+1:m}) + XY), m = min(out, in):
    leading directions are rescaled and never mixed (Elsayed et al. 2025).

    ======  ===========  =========  =============================================
    tensor  shape        trained    start
    ======  ===========  =========  =============================================
    a       (k,)         yes        0: the paper's scale less 1
    b       (k,)         yes        0
    X       (m − k, q)   yes        U(−√(6/q), √(6/q))
    Y       (q, m − k)   yes        0
    U       (out, m)     no         the left singular vectors
    Vh      (m, in)      no         the right ones, as rows
    S       (m,)         no         σ
    ======  ===========  =========  =============================================

    k = max(1, ⌊ρm⌋). Defaults: ρ = 0.1 as in the official code for SAM 2, whose q is 256 at rate 1e-4; q = 8 is ours.
    ``penalty`` times Σ ‖(1 + a)σ + b − σ‖ + ‖XY‖_F over layers is added to the loss where the loop takes auxiliary
    losses; the official trainer has 0.01, its configuration 0.

    The official code puts a ReLU over all of C, which deletes negative mixing terms with their gradients and makes the
    change of full rank: ``clip="matrix"``. It also draws every layer's X from one seed, and for SAM starts X and Y off
    the base. By default only new singular values are kept from falling below zero; one that is has no gradient any
    more, which tells at large rates: ``clip="none"`` lets values change sign. ``a`` is held as a difference, so that
    decay pulls to W and not to zero.

    W is not touched: the change is a pair of rank k + q, [U_{1:k}·diag(…) , U_{k+1:m}X] and [V_{1:k}ᵀ; YV_{k+1:m}ᵀ],
    assembled in each forward (officially W′ is). The file holds a, b, X and Y; the vectors are found in W again, in
    fp64 with fixed signs, unless two values lie so close that W does not determine them.
    """

    rank: Annotated[int, At(ge=0, doc="q, inner dimension of the block")] = 8
    ratio: Annotated[float, At(gt=0, le=1, doc="ρ, share of the values that are scaled and shifted")] = 0.1
    k: Annotated[int | None, At(ge=1, doc="their number, in place of the ratio")] = None
    clip: Annotated[Literal["none", "diag", "matrix"], At(doc="what is kept from falling below zero")] = "diag"
    penalty: Annotated[float, At(ge=0, doc="μ, weight of the regulariser")] = 0.0

    reasons = {"as_lora": 'with clip="matrix" the change has full rank'}

    def slots(self) -> Iterable[Slot]:
        k, rest = self._sizes()
        yield Slot("a", "diagonal", (k,))
        yield Slot("b", "diagonal", (k,))
        if self.rank and rest:
            yield Slot("X", "core", (rest, self.rank), _kaiming)
            yield Slot("Y", "core", (self.rank, rest))

    def build(self) -> None:
        for name, value in zip(("U", "S", "Vh"), frame(self.site.weight())):
            self.set_tensor(name, value)
        if distinct(self.S):
            self.rebuilt |= {"U", "S", "Vh"}
        self._kept = Kept()

    def match(self, state: dict[str, Tensor]) -> None:
        """Take the vectors from a saved state that has them."""
        self.rebuilt = {"U", "S", "Vh"} - set(state)

    def pair(self) -> Pair:
        trained = [getattr(self, s.name) for s in self.slots()]
        return Pair(*self._kept(self._assembled, trained, (self.U, self.S, self.Vh)), 1.0)

    def is_plain(self) -> bool:
        """It is; asking must not assemble."""
        return True

    def as_lora(self, W: Tensor, b: Tensor | None) -> LoRAForm | None:
        """A pair of rank k + q; of rank m, which is no saving, for the clipped matrix."""
        return None if self.clip == "matrix" else super().as_lora(W, b)

    def prepare(self, ctx: Context) -> None:
        if self.penalty and self.training:
            ctx.add_loss("salt", self.penalty * self.regulariser())

    def regulariser(self) -> Tensor:
        """‖(1 + a)∘σ + b − σ‖ + ‖XY‖_F of this layer; 0 with gradient 0 at the start."""
        size = self._shift().norm()
        return size + (self.X @ self.Y).norm() if hasattr(self, "X") else size

    def parameter_count(self) -> int:
        """2k + 2q(m − k)."""
        k, rest = self._sizes()
        return 2 * k + 2 * self.rank * rest

    def _sizes(self) -> tuple[int, int]:
        """k and m − k."""
        m = min(self.site.out_features, self.site.in_features)
        k = min(m, self.k or max(1, int(self.ratio * m)))
        return k, m - k

    def _shift(self) -> Tensor:
        """The change of the leading singular values, (k,)."""
        S = self.S[: len(self.a)]
        change = self.a * S + self.b
        return change if self.clip == "none" else (S + change).relu() - S

    def _assembled(self) -> tuple[Tensor, Tensor]:
        k = len(self.a)
        if self.clip == "matrix":
            return self.Vh, self.U @ self._clipped_change()
        A, B = self.Vh[:k], self.U[:, :k] * self._shift()
        if not hasattr(self, "X"):
            return A, B
        return torch.cat([A, self.Y @ self.Vh[k:]]), torch.cat([B, self.U[:, k:] @ self.X], dim=1)

    def _clipped_change(self) -> Tensor:
        """ReLU(C) − diag(σ), (m, m)."""
        k = len(self.a)
        lower = torch.diag(self.S[k:]) + (self.X @ self.Y if hasattr(self, "X") else 0.0)
        C = torch.block_diag(torch.diag(self.S[:k] + self.a * self.S[:k] + self.b), lower)
        return C.relu() - torch.diag(self.S)


def _kaiming(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Kaiming-uniform with ReLU's gain on the last dimension."""
    bound = (6 / shape[-1]) ** 0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
