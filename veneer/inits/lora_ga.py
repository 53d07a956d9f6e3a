"""LoRA-GA: start the factors at the singular vectors of the gradient."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from veneer.core.delta import Delta
from veneer.core.registry import method
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics import chance
from veneer.numerics.svd import truncated_svd
from veneer.parts.layerwise import GradientSum, LayerwiseInit


@method("lora-ga", axis="init", paper="arXiv:2407.05000", system=14, wants=("pair",), defaults="lora")
class LoRAGA(LayerwiseInit):
    """The first step of B·A points where full fine-tuning would move W.

    G = ∂L/∂W over the calibration batches, G = UΣVᵀ, A₀ = c·V[:, I_A]ᵀ, B₀ = c·U[:, I_B] with disjoint I_A, I_B of the
    first 2r, W₀ = W − s·B₀A₀ (Wang et al. 2024, Thm. 3.1). Then s·BA changes to first order by −ηs²c²·G_2r, the best
    rank-2r approximation of the gradient step. c = out^¼/√γ keeps the variance of outputs and gradients.

    ==============  =========  =========  =============================================
    tensor          shape      trained    start
    ==============  =========  =========  =============================================
    A               (r, in)    yes        c·v_iᵀ, i ∈ I_A
    B               (out, r)   yes        c·u_i, i ∈ I_B
    offset A₀, B₀   as A, B    no         copies of A and B, saved with the adapter
    ==============  =========  =========  =============================================

    Defaults are the official code's: I_A = 1…r and I_B = r+1…2r (``"ArB2r"``), γ = 16, ``scale="stable"``. The paper's
    language runs use rslora with r = 8, α = 16, γ = 64, and 8 to 128 samples for G.

    PEFT's port has another rule, ``rule="peft"``: A = V[:, I_A]ᵀ and B = c·U[:, I_B]Σ, so the size of the loss decides
    the size of B. W is not written here. Where 2r exceeds the rank of W, what is missing in one factor is zero; both
    published codes fail. The decomposition is randomised, as theirs. The gradients of one block exist at a time, for
    one more forward pass; theirs hold all of them.
    """

    gamma: Annotated[float, At(gt=0, doc="γ of the stable scale; larger starts smaller")] = 16.0
    direction: Annotated[
        Literal["ArB2r", "A2rBr", "ArBr", "random"], At(doc="which of the first 2r singular vectors go to A and B")
    ] = "ArB2r"
    scale: Annotated[
        Literal["stable", "unit", "gd", "weight"], At(doc="c: out^¼/√γ, 1, 1/s, or from the singular values of W")
    ] = "stable"
    rule: Annotated[Literal["official", "peft"], At(doc="whether the singular values of G stay out of B")] = "official"
    clip: Annotated[bool, At(doc="shrink A and B where max|s·BA| exceeds max|W|")] = False
    exact: Annotated[bool, At(doc="a full decomposition of G")] = False

    offset: ClassVar[bool] = True
    backward: ClassVar[bool] = True

    def watcher(self, site: Site) -> GradientSum:
        return GradientSum(site)

    def start_from(self, delta: Delta, found: GradientSum) -> dict[str, Tensor]:
        site, s = delta.site, delta.scale
        r = next(slot.shape[0] for slot in delta.slots() if slot.role == "factor_a")
        most = min(site.out_features, site.in_features)
        if r > most:
            raise UserError(f"lora-ga: rank={r} is more than the gradient at {site.path} has singular values, {most}")
        generator = chance.generator(self.seed, site.path, self.name)
        U, S, Vh = self._gradient(site, found, min(2 * r, most), generator)
        into_A, into_B = self._shares(r, generator)
        A, B = _padded(Vh.T, into_A).T, _padded(U, into_B)
        sizes = _padded(S[None], into_B)[0]
        a, b = self._sizes(site.weight(), r, s, sizes)
        A, B = a * A, b * (B if self.rule == "official" else B * sizes)
        if self.clip:
            ratio = (site.weight().abs().max().float() / (s * B @ A).abs().max()).clamp_max(1.0).sqrt()
            A, B = ratio * A, ratio * B
        return {"factor_a": A, "factor_b": B}

    def _gradient(
        self, site: Site, found: GradientSum, k: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The leading k singular triplets of the mean gradient."""
        if found.total is None:
            raise UserError(f"lora-ga: no gradient of the calibration loss reaches {site.path}; leave it out of sites")
        if not torch.isfinite(found.total).all():
            raise UserError(f"lora-ga: the gradient at {site.path} is not finite; look at the calibration batches")
        return truncated_svd(found.total / self.count, k, exact=self.exact, generator=generator)

    def _shares(self, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """I_A and I_B, from 0."""
        every = torch.arange(2 * r)
        if self.direction == "random":
            every = torch.randperm(2 * r, generator=generator)
        if self.direction == "ArBr":
            return every[1::2], every[::2]
        return (every[r:], every[:r]) if self.direction == "A2rBr" else (every[:r], every[r:])

    def _sizes(self, W: Tensor, r: int, s: float, sizes: Tensor) -> tuple[float, float]:
        """The factors of A and of B; PEFT's rule puts all of it on B, but for "gd"."""
        official = self.rule == "official"
        if self.scale == "weight":
            values = truncated_svd(W, r)[1]
            return ((values / s).sqrt().mean(),) * 2 if official else (1.0, values[0] / sizes[0])
        c = {"stable": W.shape[0] ** 0.25 / self.gamma**0.5, "unit": 1.0, "gd": 1 / s}[self.scale]
        return (c, c) if official or self.scale == "gd" else (1.0, c)


def _padded(M: Tensor, columns: Tensor) -> Tensor:
    """These columns of M, zeros where M has none."""
    return torch.cat([M, M.new_zeros(len(M), max(0, int(columns.max()) + 1 - M.shape[1]))], dim=1)[:, columns]
