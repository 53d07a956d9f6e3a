"""EVA: start A at the principal directions of the layer's inputs, and give rank where they explain most."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from veneer.core.hook import Init, Plan
from veneer.core.registry import method
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.fields import At
from veneer.parts.evidence import Evidence


@method("eva", axis="init", paper="arXiv:2410.07170", system=64, wants=("pair",), defaults="lora")
class EVA(Init):
    """A holds the leading right singular vectors of the layer's own inputs; B = 0, and W is not touched.

    A = [v_1; …; v_r′] of the centred inputs X − x̄ over the calibration batches, ξ_i = σ_i²/Σσ² their share of the
    variance (Paischer et al. 2024, Alg. 1). The budget Σr goes to the largest ξ of all layers, at most round(ρ·r) of
    any one; a layer that gets none loses its adapter.

    =======  =========  =========  =========================================
    tensor   shape      trained    start
    =======  =========  =========  =========================================
    A        (r′, in)   yes        v_iᵀ, orthonormal; v_iᵀ/√σ_i if whitened
    B        (out, r′)  yes        0
    =======  =========  =========  =========================================

    Defaults are PEFT's: ρ = 2, no whitening, positions without a label left out, and α′ = α·r′/r so that α/r is the
    same in all layers (the official script leaves α alone). ρ = 1 gives every layer its r.

    All calibration batches are used, once; the official code cycles through its data until the directions stand still,
    without an upper bound. Batches with too few rows are collected and not skipped. Of equal shares the earlier layer's
    come first. Beside a method that decides the ranks EVA gives the start alone, and where that asks for more
    directions than were gathered, random ones orthogonal to them fill up.
    """

    rho: Annotated[float, At(ge=1, doc="the most rank a layer can get, over its own")] = 2.0
    whiten: Annotated[bool, At(doc="divide each direction by the root of its singular value")] = False
    labels_only: Annotated[bool, At(doc="leave out positions whose label is −100")] = True
    adjust_alpha: Annotated[bool, At(doc="scale alpha with the rank, so that alpha / rank stays")] = True

    needs = frozenset({"input_svd"})

    def components_wanted(self, form: dict[str, Any]) -> int:
        """round(ρ·r) directions of each layer."""
        return round(self.rho * form["rank"])

    def plan(self, sites: list[Site], evidence: Evidence, form: dict[str, Any]) -> Plan:
        """The rank of every site, None where nothing is left."""
        rank, most = form["rank"], self.components_wanted(form)
        shares = [
            (-float(share), place, i)
            for place, site in enumerate(sites)
            for i, share in enumerate(_inputs(site, evidence).explained_variance_ratio[:most])
        ]
        kept = [place for _, place, _ in sorted(shares)[: rank * len(sites)]]
        plan: Plan = {}
        for place, site in enumerate(sites):
            own = kept.count(place)
            plan[site.path] = {"rank": own} if own else None
            if own and self.adjust_alpha and form.get("alpha") is not None:
                plan[site.path]["alpha"] = form["alpha"] * own / rank
        return plan

    def start(self, site: Site, slots: list[Any], evidence: Evidence, generator: torch.Generator) -> dict[str, Tensor]:
        shapes = {s.role: s.shape for s in slots}
        rank, inn = shapes["factor_a"]
        inputs = _inputs(site, evidence)
        A, sizes = inputs.components[:rank], inputs.singular_values[:rank]
        if self.whiten:
            A = A / torch.where(sizes > 1e-6 * sizes[0], sizes, 1.0).sqrt()[:, None]
        if len(A) < rank:
            more = torch.randn(rank - len(A), inn, generator=generator).to(A)
            if rank <= inn:
                V = inputs.components[:rank]
                more = torch.linalg.qr(torch.cat([V, more]).T).Q.T[len(V) :]
            A = torch.cat([A, more / more.norm(dim=1, keepdim=True)])
        return {"factor_a": A, "factor_b": torch.zeros(shapes["factor_b"])}


def _inputs(site: Site, evidence: Evidence) -> Any:
    """The principal components of a layer's inputs; raises UserError where there were too few rows."""
    inputs = evidence[site].inputs
    if inputs is None or not inputs.count:
        raise UserError(
            f"eva: {site.path} saw only {evidence[site].tokens} rows in calibration; give more or longer batches, or "
            "eva(labels_only=False) to count positions without a label"
        )
    return inputs
