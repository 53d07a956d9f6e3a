"""LaMDA++: more rank where the leading singular values of W hold less of it."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from veneer.core.hook import Plan, Ranks
from veneer.core.registry import method, system
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.chance import generator
from veneer.numerics.svd import randomized_svd


@method("lamda-ranks", axis="ranks", paper="arXiv:2406.12832", system=27)
class LaMDARanks(Ranks):
    """Ranks from the spectrum of W alone, before training; LaMDA with it is LaMDA++ (Azizi et al. 2024, §3).

    E = Σ_{i ≤ r̄} σ_i² / Σ_i σ_i² for each matrix, r̄ being the form's rank. Sorted by E, the lowest third gets r̄ + d,
    the highest r̄ − d, the others r̄, with d = ⌊r̄·``spread``⌋. Equal energies go by name.

    Defaults: d = r̄/2. The paper speaks of a normalised-energy analysis; the rule itself is ours, its code holds none.
    The sum of ranks stays r̄ times the number of matrices, but where a matrix is too small for its rank. α moves with
    the rank, so that α/r is the same everywhere. It takes no data and one truncated SVD a matrix, and serves any form
    that has a rank, as in "lora+lamda-ranks"; "lamda-plus", or "lamda++" where it stands alone, is "lamda+lamda-ranks".
    """

    spread: Annotated[float, At(ge=0, lt=1, doc="how far ranks move from the mean, over the mean")] = 0.5

    def plan(self, sites: list[Site], evidence: Any, form: dict[str, Any]) -> Plan:
        """The rank of every site."""
        rank = form.get("rank")
        if not isinstance(rank, int):
            raise UserError(
                "lamda-ranks gives ranks, and the form of this recipe has no field 'rank'; take lamda or lora"
            )
        energies = {s.path: energy(s.weight(), rank, generator(self.seed, s.path, "lamda energy")) for s in sites}
        order = sorted(sites, key=lambda s: (energies[s.path], s.path))
        third, far = round(len(order) / 3), int(rank * self.spread)
        shift = [far] * third + [0] * (len(order) - 2 * third) + [-far] * third
        plan: Plan = {}
        for site, more in zip(order, shift):
            own = min(rank + more, site.out_features, site.in_features)
            plan[site.path] = {"rank": own}
            if form.get("alpha") is not None:
                plan[site.path]["alpha"] = form["alpha"] * own / rank
        return plan


@torch.no_grad()
def energy(W: Tensor, rank: int, draw: torch.Generator | None = None) -> float:
    """The share of ‖W‖_F² in the ``rank`` largest singular values of W (out, in); 0 of a zero matrix."""
    whole = torch.linalg.vector_norm(W, dtype=torch.float32).square()
    leading = randomized_svd(W, rank, generator=draw)[1].square().sum()
    return float(leading / whole.clamp_min(torch.finfo(torch.float32).tiny))


for _name in ("lamda-plus", "lamda++"):
    system(_name, "lamda+lamda-ranks")
