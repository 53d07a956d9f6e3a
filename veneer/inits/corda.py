"""CorDA: start the factors at the part of W that matters most, or least, to inputs like those given."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from veneer.core.delta import Delta
from veneer.core.registry import method
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.chance import generator
from veneer.numerics.svd import truncated_svd
from veneer.parts.layerwise import LayerwiseInit

SHARES = {"both": 0.5, "B": 1.0, "A": 0.0}  # the power of σ that goes to B


class Moment:
    """Σ x̃ᵀx̃ (in, in) of a layer's inputs, not centred, x̃ being x over its sample's largest entry.

    At an embedding, whose inputs are one-hot, that is a diagonal and kept as such.
    """

    def __init__(self, normalise: bool) -> None:
        self.normalise = normalise
        self.total: Tensor | None = None
        self.samples = self.rows = 0

    def inputs(self, site: Site, x: Tensor, mask: Tensor | None) -> None:
        """Add one batch; a sample is a row of it, or all of it where it has no rows."""
        mask = None if site.kind == "conv" else mask
        n = x.shape[0] if x.ndim > 2 or site.kind == "embedding" else 1
        self.samples += n
        if self.total is None:
            inn = site.in_features
            self.total = torch.zeros((inn,) if site.kind == "embedding" else (inn, inn), device=x.device)
        if site.kind == "embedding":
            ids = (x if mask is None else x[mask]).reshape(-1)
            self.total += torch.bincount(ids, minlength=len(self.total))
            self.rows += len(ids)
            return
        samples = site.input_rows(x).float().view(n, -1, site.in_features)
        if mask is not None:
            samples = samples * mask.view(*samples.shape[:2], 1)
        self.rows += samples[..., 0].numel() if mask is None else int(mask.sum())
        if self.normalise:
            largest = samples.abs().amax((1, 2), keepdim=True)
            samples = samples / torch.where(largest > 0, largest, 1.0)
        flat = samples.flatten(0, 1)
        self.total.addmm_(flat.T, flat)

    def gradient(self, site: Site, x: Tensor, grad: Tensor) -> None:
        """None is asked for."""

    def seen_by(self, W: Tensor, damping: float) -> Tensor:
        """W·(C + δ·mean(diag C)·I), of the shape of W (out, in)."""
        C = self.total / self.samples
        ridge = damping * float((C if C.ndim == 1 else C.diagonal()).mean())
        return W * (C + ridge) if C.ndim == 1 else (W @ C).add_(W, alpha=ridge)


@method("corda", axis="init", paper="arXiv:2406.05223", system=93, wants=("pair",), defaults="lora")
class CorDA(LayerwiseInit):
    """The components of W that a context uses most, or least, move into the trained factors.

    C is the mean of X̃ᵀX̃ over the calibration samples, W·C_δ = UΣVᵀ with C_δ = C + δ·mean(diag C)·I, so W = UΣV̂ᵀ with
    V̂ᵀ = VᵀC_δ⁻¹. A₀ = √(Σ_I/s)·V̂_Iᵀ, B₀ = U_I·√(Σ_I/s), y = x(W − s·B₀A₀)ᵀ + b + s·xAᵀBᵀ (Yang et al. 2024, §3).
    I holds the first r (``mode="ipm"``, instruction-previewed: calibrate on the task, learn it fast) or the last r of
    min(out, in) (``"kpm"``, knowledge-preserved: calibrate on what is to be kept, train what it uses least).

    ==============  =========  =========  =============================================
    tensor          shape      trained    start
    ==============  =========  =========  =============================================
    A               (r, in)    yes        √(σ_i/s)·v̂_i
    B               (out, r)   yes        √(σ_i/s)·u_i
    offset A₀, B₀   as A, B    no         copies of A and B, saved with the adapter
    ==============  =========  =========  =============================================

    Defaults are those of the official code and of PEFT: δ = 0.01, σ split evenly. The paper takes 256 samples of 2048
    tokens, r = α = 128 and every linear layer but the head; PEFT advises 128·in/tokens samples.

    Since Uᵀ·W·C_δ = ΣVᵀ, V̂ᵀ is Σ⁻¹UᵀW: no inverse of C_δ is taken, s·B₀A₀ = U_I·U_Iᵀ·W, and δ need not be doubled until
    an inverse in fp32 is good. Samples are scaled by their largest magnitude and padding is left out; both published
    codes take the magnitude of the largest signed entry, of batches of one row. The first r come from a block Krylov
    method (``exact`` takes all), the last r from an fp64 Gram matrix. C of one block exists at a time, and layers that
    read one tensor share it. Dropout is refused, as it would drop parts of W.
    """

    mode: Annotated[Literal["ipm", "kpm"], At(doc="whether the first or the last components train")] = "ipm"
    damping: Annotated[float, At(gt=0, doc="δ, over the mean of C's diagonal")] = 0.01
    split: Annotated[Literal["both", "B", "A"], At(doc="which factor σ goes to")] = "both"
    normalise: Annotated[bool, At(doc="divide each sample by its largest magnitude")] = True
    exact: Annotated[bool, At(doc="a full decomposition for the first components too")] = False

    offset: ClassVar[bool] = True

    def watcher(self, site: Site) -> Moment:
        if not site.factored():
            raise UserError(f"corda: {site.path} is a grouped convolution, whose inputs are several; leave it out")
        return Moment(self.normalise)

    def start_from(self, delta: Delta, found: Moment) -> dict[str, Tensor]:
        site, s = delta.site, delta.scale
        if getattr(delta, "dropout", 0.0):
            raise UserError(f"corda with dropout={delta.dropout} would drop parts of W; leave dropout at 0")
        W, rank = site.weight().float(), next(slot.shape[0] for slot in delta.slots() if slot.role == "factor_a")
        if rank > min(W.shape):
            raise UserError(f"corda: rank={rank} is more than {site.path} has singular values, {min(W.shape)}")
        if not found.rows:
            raise UserError(f"corda: {site.path} saw no input in calibration; look at the attention masks")
        seen = found.seen_by(W, self.damping)
        if not torch.isfinite(seen).all():
            raise UserError(f"corda: the inputs of {site.path} are not finite; look at the calibration batches")
        if self.mode == "kpm":
            U, S = last_directions(seen, rank)
        else:
            U, S, _ = truncated_svd(seen, rank, exact=self.exact, generator=generator(self.seed, site.path, "corda"))
        size = S.clamp_min(1e-7 * float(torch.linalg.matrix_norm(seen))) / s  # directions that W·C lacks keep a size
        share = SHARES[self.split]
        return {"factor_a": size[:, None] ** -share * (U.T @ W) / s, "factor_b": U * size**share}


def last_directions(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The last ``rank`` left singular vectors (m, rank) of the min(m, n) of M (m, n) and their values, descending.

    From the fp64 Gram matrix of the short side: as near to the least as a decomposition in fp32 comes, and faster.
    """
    wide = M.double()
    if M.shape[0] <= M.shape[1]:
        U = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, :rank].flip(1)
        return U.to(M.dtype), torch.linalg.vector_norm(U.T @ wide, dim=1).to(M.dtype)
    image = wide @ torch.linalg.eigh(wide.T @ wide).eigenvectors[:, :rank].flip(1)
    Q, R = torch.linalg.qr(image)
    return (Q * R.diagonal().sign()).to(M.dtype), torch.linalg.vector_norm(image, dim=0).to(M.dtype)
