"""LoftQ: start the factors at what quantising the base loses."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.build import all_fields
from veneer.core.hook import Init, Storage
from veneer.core.registry import method
from veneer.core.site import Site, stored
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.chance import generator as draws
from veneer.numerics.svd import randomized_svd, truncated_svd


@method("loftq", axis="init", paper="arXiv:2310.08659", system="048b", wants=("pair",), defaults="lora+nf4")
class LoftQ(Init):
    """The stored base and the factors are chosen together, so that Ŵ + s·BA starts as near to W as rank r allows.

    L = 0; T times: Ŵ = q(W − L), UΣVᵀ = W − Ŵ, L = U_rΣ_rV_rᵀ; then s·B₀A₀ = L with B₀ = U_r·√(Σ_r/s),
    A₀ = √(Σ_r/s)·V_rᵀ (Li et al. 2023, algorithm 1). The base is stored as the last Ŵ.

    ======  =========  =========  ==============
    tensor  shape      trained    start
    ======  =========  =========  ==============
    A       (r, in)    yes        √(σ_i/s)·v_iᵀ
    B       (out, r)   yes        √(σ_i/s)·u_i
    ======  =========  =========  ==============

    T = 1 by default, as in PEFT (the paper has 5): the stored base is then q(W), the same as without LoftQ. With more,
    the base depends on r and is made again, by the same steps, when the adapter is loaded on W. No data is needed. Any
    storage of the base axis is q; layers that it leaves dense, and forms without a place in them, start as they do.

    PEFT copies A and B without regard to s, so its start is right for α = r alone, and stores the base without double
    quantisation, on CUDA. Here s is divided out, and q is whatever the recipe says.
    """

    iterations: Annotated[int, At(ge=1, doc="T, rounds of quantising and decomposing")] = 1
    exact: Annotated[bool, At(doc="a full decomposition instead of a randomised one")] = False

    layers: ClassVar[tuple[str, ...]] = ("linear",)
    starts_at_base = False
    reasons: ClassVar[dict[str, str]] = {
        "starts_at_base": "the factors start at what the stored base lost, nearer to the model as it was given"
    }

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.found: dict[str, tuple[Tensor, Tensor]] = {}  # by site: U_r√Σ_r and √Σ_r·V_rᵀ, until the start took them

    @torch.no_grad()
    def before_conversion(self, site: Site, storage: Storage) -> None:
        parts = [s for s in self.adapter.sites if s.module is site.module and s.kind == "linear"]
        if stored(site.module) or not parts:  # converted with the first part of a fused projection; or not adapted
            return
        whole = Site(site.module_path, site.module, "linear")
        W, L = whole.weight().float(), 0.0
        for _ in range(self.iterations):
            target = (W - L).to(whole.weight().dtype)
            lost = W - self._stored(target, storage)
            L = torch.zeros_like(W)
            for part in parts:
                rows = slice(None) if part.rows is None else part.rows
                B, A = self._leading(lost[rows], part)
                self.found[part.path] = B, A
                L[rows] = B @ A
        if self.iterations > 1:
            whole.write(target)

    def start(self, site: Site, slots: list[Any], evidence: Any, generator: torch.Generator) -> dict[str, Tensor]:
        if site.path not in self.found:
            if stored(site.module):
                raise UserError(
                    f"loftq: {site.path} was stored quantised before; load the model with its dense weights"
                )
            return {}
        B, A = self.found[site.path]
        root = self.delta.scale**0.5
        return {"factor_a": A / root, "factor_b": B / root}

    def on_attach(self, adapter: Adapter) -> None:
        self.found.clear()

    def _stored(self, W: Tensor, storage: Storage) -> Tensor:
        """q(W) in fp32, by a trial layer."""
        trial = nn.Linear(1, 1, bias=False, device="meta")  # which draws nothing
        trial.weight = nn.Parameter(W.contiguous(), requires_grad=False)
        trial.out_features, trial.in_features = W.shape
        at = Site("trial", trial, "linear", *W.shape)
        storage.convert(at)
        return at.weight().float()

    def _leading(self, lost: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """U_r√Σ_r (out, r) and √Σ_r·V_rᵀ (r, in) of what is lost at a site."""
        rank = (all_fields(self.adapter.recipe.part("delta")) | (self.adapter.plan.get(site.path) or {}))["rank"]
        if rank > min(lost.shape):
            raise UserError(f"loftq: rank={rank} is more than {site.path} has singular values, {min(lost.shape)}")
        if self.exact:
            U, S, Vh = truncated_svd(lost, rank, exact=True)
        else:
            U, S, Vh = randomized_svd(lost, rank, generator=draws(self.seed, site.path, "loftq"))
        return U * S.sqrt(), S.sqrt()[:, None] * Vh
