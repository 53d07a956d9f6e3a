"""LoRA-SB: frozen bases and a start of the core from the first step that full fine-tuning would take."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from veneer.core.adapter import Adapter
from veneer.core.delta import Delta
from veneer.core.registry import method
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.chance import generator
from veneer.numerics.svd import truncated_svd
from veneer.parts.layerwise import GradientSum, LayerwiseInit, as_it_is, batch_loss

RATE = 1e-4  # η₁ where neither the field nor a schedule says it


@method("lora-sb", axis="init", paper="arXiv:2411.19557", system=36, wants=("core",), defaults="lora-xs")
class LoRASB(LayerwiseInit):
    """The r² numbers between two frozen bases go on along the path that full fine-tuning would begin.

    ΔW₁ = −η₁·sign(G) with G = Σ ∂L/∂W over the calibration batches is AdamW's first step; ΔW₁ ≈ UΣVᵀ of rank r gives
    B = U, A = Vᵀ and R₀ = Σ/s, so y = xWᵀ + b + s·((xAᵀ)Rᵀ)Bᵀ starts with that step taken (Ponkshe et al. 2024, §3).
    With orthonormal bases and s = 1 the gradient of R is the best that any M does for B·M·A ≈ G: no α to tune.

    ======  =========  =========  ==============================
    tensor  shape      trained    start
    ======  =========  =========  ==============================
    A       (r, in)    no         Vᵀ
    R       (r, r)     yes        diag(σ)/s
    B       (out, r)   no         U
    ======  =========  =========  ==============================

    η₁ is the rate of the first step of the schedule given to ``attach``, as in the official code, and 1e-4 without one.
    Official: r = 96, 50 to 170 examples, rates of 1e-4 to 2e-3 with 2 % warm-up, no weight decay (which would draw R
    back to the base). W is not compensated: the start is off the base, by intent.

    ``guard`` halves η₁ while the loss on the calibration batches is above the base's; the official code has no such
    thing, and on SmolLM2-135M η₁ = 5e-4 over all layers costs 0.7 nat. Its factors are rounded to bf16, which spoils
    their orthogonality, and its estimate runs in training mode; here they are fp32 and eval mode. ``update="gradient"``
    takes the bases of G itself, which hold more of later gradients, and a ΔW₁ as large as the sign's rank-r part. The
    form is the recipe's, by default LoRA-XS's. The gradients of one block exist at a time.
    """

    rate: Annotated[float | None, At(gt=0, doc="η₁; the schedule's first, or 1e-4, when None")] = None
    update: Annotated[Literal["sign", "gradient"], At(doc="whose singular vectors are the bases")] = "sign"
    guard: Annotated[int, At(ge=0, doc="how often η₁ may be halved to keep the loss from rising")] = 6
    exact: Annotated[bool, At(doc="a full decomposition of every ΔW₁")] = False

    backward: ClassVar[bool] = True
    starts_at_base: ClassVar[bool] = False
    reasons: ClassVar[dict[str, str]] = {"starts_at_base": "it starts with the estimated first step already taken"}
    batches: list[Any] | None = None

    def watcher(self, site: Site) -> GradientSum:
        return GradientSum(site)

    def start_from(self, delta: Delta, found: GradientSum) -> dict[str, Tensor]:
        site, G = delta.site, found.total
        rank = next(slot.shape[0] for slot in delta.slots() if slot.role == "core")
        if G is None:
            raise UserError(f"lora-sb: no gradient of the calibration loss reaches {site.path}; leave it out of sites")
        if not torch.isfinite(G).all():
            raise UserError(f"lora-sb: the gradient at {site.path} is not finite; look at the calibration batches")
        if rank > min(G.shape):
            raise UserError(f"lora-sb: rank={rank} is more than the gradient at {site.path} has, {min(G.shape)}")
        U, S, Vh = self._leading(-G.sign(), rank, site)
        if self.update == "gradient":
            size = S.norm()
            U, S, Vh = self._leading(-G, rank, site)
            S = S * (size / S.norm().clamp_min(torch.finfo(S.dtype).tiny))
        return {"factor_a": Vh, "factor_b": U, "core": torch.diag(S / delta.scale)}

    def settle(self, adapter: Adapter, batches: list[Any]) -> None:
        super().settle(adapter, batches)
        self.batches = batches

    @torch.no_grad()
    def on_attach(self, adapter: Adapter) -> None:
        """Take the step at η₁, or at what the guard leaves of it; nothing when the adapter comes from a file."""
        if self.batches is None:
            return
        batches, self.batches = self.batches, None
        schedule = getattr(self, "schedule", None)
        rate = self.rate or (RATE if schedule is None else schedule.lr * schedule.factor(0))
        self._scale(adapter, rate)
        if not self.guard:
            return
        model = adapter.model

        def loss() -> float:
            return sum(float(batch_loss(model, batch)) for batch in batches)

        with as_it_is(model):
            with adapter.disabled():
                base = loss()
            for _ in range(self.guard):
                if loss() <= base:
                    break
                self._scale(adapter, 0.5)

    def _scale(self, adapter: Adapter, factor: float) -> None:
        for delta in adapter.members():
            name = next(slot.name for slot in delta.slots() if slot.role == "core")
            getattr(delta, name).mul_(factor)

    def _leading(self, M: Tensor, rank: int, site: Site) -> tuple[Tensor, Tensor, Tensor]:
        return truncated_svd(M, rank, exact=self.exact, generator=generator(self.seed, site.path, "lora-sb"))
