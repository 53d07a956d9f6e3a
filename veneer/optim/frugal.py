"""FRUGAL: Adam for a share of every gradient, a rule without state for the rest."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.models import architecture
from veneer.numerics import chance
from veneer.numerics.subspace import frame_of, project, project_back, sides
from veneer.parts.tensor_steps import TensorOptimizer, TensorSteps, adam_moments

COORDINATES = ("columns", "rows", "entries")
RESET = ("exp_avg", "exp_avg_sq")


def down(G: Tensor, kept: dict[str, Tensor]) -> Tensor:
    """The part of G (m, n) that has state: chosen columns, rows or entries, or its coordinates in a frame."""
    if "columns" in kept:
        return G.index_select(1, kept["columns"])
    if "rows" in kept:
        return G.index_select(0, kept["rows"])
    return G.flatten()[kept["entries"]] if "entries" in kept else project(G, kept)


def combine(u: Tensor, G: Tensor, kept: dict[str, Tensor], free: Any) -> Tensor:
    """The step (m, n): u on the part with state, ``free`` of the rest of G elsewhere."""
    if "columns" in kept:
        return free(G).index_copy_(1, kept["columns"], u)
    if "rows" in kept:
        return free(G).index_copy_(0, kept["rows"], u)
    if "entries" in kept:
        return free(G).view(-1).index_copy_(0, kept["entries"], u).view_as(G)
    return free(G - project_back(project(G, kept), kept)).add_(project_back(u, kept))


def active(count: int, share: float, order: str, period: int, seed: int) -> set[int]:
    """The round(share·count) units of ``count`` that have state in a period.

    ``ascending`` and ``descending`` go round, ``mirror`` takes half from each end, ``random`` visits all once in
    ⌈count/active⌉ periods before it draws another order. The last periods of a round reach into the next.
    """
    most = round(share * count)
    if not most:
        return set()
    place = period * most
    if order == "mirror":
        half = most // 2
        low = [(period * half + i) % count for i in range(half)]
        return {*low, *(count - 1 - i for i in low)}
    walk = list(range(count))
    if order == "descending":
        walk.reverse()
    elif order == "random":
        round_, within = divmod(period, math.ceil(count / most))
        walk = torch.randperm(count, generator=chance.generator(seed, "frugal units", round_)).tolist()
        place = within * most
    return {walk[(place + i) % count] for i in range(most)}


@method("frugal", axis="optim", paper="arXiv:2411.07837", system=58, wants=("dense-gradient",), defaults="full")
class FRUGAL(TensorSteps):
    """AdamW on a share ρ of every gradient, the sign of the rest, so that every weight moves (Zmushko et al. 2024).

    W ← W(1 − η·λ); then W ← W − η·κ·up(N) − η·κ·κ_f·sign(Q), where N is Adam's step from the moments of R = down(G),
    with bias corrections and ε as in torch, and Q = G − up(R). Every T steps the part with state is drawn anew and its
    moments and their clock start at 0. ``part`` says what it is:

    ===================  ==================================  =======================================
    part                 R                                   state of a matrix (out, in)
    ===================  ==================================  =======================================
    columns              ⌊ρ·in⌋ columns of G                 2·out·⌊ρ·in⌋, and their numbers
    rows                 ⌊ρ·out⌋ rows                        2·⌊ρ·out⌋·in, and their numbers
    entries              ⌊ρ·out·in⌋ entries                  2·⌊ρ·out·in⌋, and their numbers
    svd random randperm  G·P (out < in: PᵀG), r = round(ρ·   P and 2·max(out, in)·r
                         min(out, in))
    tensors blocks       all of G in round(ρ·n) of n units,  2·out·in in those, nothing in others
                         nothing in the others
    ===================  ==================================  =======================================

    P holds the leading singular vectors of G, a random orthonormal basis, or chosen axes; ``side`` as in GaLore.
    Vectors, tables, heads and what ``train`` names get plain AdamW.

    Defaults: ρ = 0.25, T = 200, κ = 1, κ_f = 1, β = (0.9, 0.999), ε = 1e-8. The authors fine-tune on columns with
    κ_f = 0.1 and T = 500, and pre-train on blocks with κ_f = 1 at 1e-3; λ is the run's. GaLore is
    ``part="svd", rule="none", reset=False``, BAdam ``part="blocks", rule="none"``.

    The sign of Q is not outside the subspace where Q is: with ``svd`` the free step moves W inside as well. Clipping by
    the global norm does not touch it, so the rate must fall to 0 by the schedule. A free step of the raw gradient
    (``rule="sgd"``) needs another κ_f, by orders of magnitude. The official "blocks" are single tensors: ``tensors``
    here. Draws depend on seed, name and period alone. ``inner`` puts Lion or momentum in Adam's place.
    """

    share: Annotated[float, At(ge=0, le=1, doc="ρ, of the gradient that has state")] = 0.25
    part: Annotated[
        Literal["columns", "rows", "entries", "svd", "random", "randperm", "tensors", "blocks"],
        At(doc="how that share is taken"),
    ] = "columns"
    side: Annotated[Literal["std", "reverse_std", "left", "right"], At(doc="what bases project")] = "std"
    order: Annotated[Literal["random", "ascending", "descending", "mirror"], At(doc="of tensors and blocks")] = "random"
    gap: Annotated[int, At(ge=1, doc="T, steps between two draws")] = 200
    rule: Annotated[Literal["sign", "sgd", "none"], At(doc="the step without state")] = "sign"
    inner: Annotated[Literal["adamw", "lion", "momentum"], At(doc="the step with state")] = "adamw"
    scale: Annotated[float, At(gt=0, doc="κ, on the rate of projected matrices")] = 1.0
    free_scale: Annotated[float, At(ge=0, doc="κ_f, on the rate of the step without state")] = 1.0
    reset: Annotated[bool, At(doc="start moments and clock anew at each draw")] = True
    beta1: Annotated[float, At(ge=0, lt=1, doc="decay of the first moment")] = 0.9
    beta2: Annotated[float, At(ge=0, lt=1, doc="decay of the second moment")] = 0.999
    eps: Annotated[float, At(gt=0, doc="added to the root of the corrected second moment")] = 1e-8

    def stepper(self, groups: list[dict[str, Any]], names: dict[nn.Parameter, str]) -> TensorOptimizer:
        return FRUGALAdamW(groups, self, names, self._units(groups) if self.part in ("tensors", "blocks") else [])

    def _units(self, groups: list[dict[str, Any]]) -> list[str]:
        """What is active as a whole: prefixes of names, in the order of the model."""
        names = list(dict.fromkeys(n for g in groups if g.get("projected") for n in g["names"]))
        paths = [f"{path}." for path, _ in architecture.blocks(self.adapter.model)]
        if self.part == "blocks":
            names = list(dict.fromkeys(next((b for b in paths if n.startswith(b)), n) for n in names))
        if self.order == "mirror" and (len(names) % 2 or round(self.share * len(names)) % 2):
            raise UserError(
                f"frugal(order='mirror') takes half of the active ones from each end: {round(self.share * len(names))} "
                f"of {len(names)} {self.part} do not halve; change share or order"
            )
        return names


class FRUGALAdamW(TensorOptimizer):
    """The split step for groups with ``projected``, torch's AdamW for the others."""

    def __init__(
        self, groups: list[dict[str, Any]], method: FRUGAL, names: dict[nn.Parameter, str], units: list[str]
    ) -> None:
        super().__init__(groups, method, names)
        self.units = units

    def update(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        """Step one tensor by its gradient."""
        state, hook, lr = self.state[p], self.method, group["lr"]
        t = state.setdefault("step", 0)
        p.mul_(1 - lr * group["weight_decay"])
        if not group["projected"]:
            p.sub_(self._with_state(state, p.grad, group, t + 1, "adamw"), alpha=lr)
        else:
            G = p.grad.flatten(1)
            if t % hook.gap == 0:
                self._draw(p, G, state, t // hook.gap)
            age = 1 + (t % hook.gap if hook.reset else t)
            p.sub_(self._split(p, G, state, group, age).view_as(p), alpha=lr * hook.scale)
        state["step"] = t + 1

    def _split(self, p: nn.Parameter, G: Tensor, state: dict[str, Any], group: dict[str, Any], age: int) -> Tensor:
        hook = self.method
        if self.units:
            return self._with_state(state, G, group, age, hook.inner) if state["active"] else self._free(G)
        kept = {k: state[k] for k in (*COORDINATES, "left", "right") if k in state}
        if not any(k.numel() for k in kept.values()):
            return self._free(G)
        return combine(self._with_state(state, down(G, kept), group, age, hook.inner), G, kept, self._free)

    def _free(self, Q: Tensor) -> Tensor:
        rule, scale = self.method.rule, self.method.free_scale
        return torch.zeros_like(Q) if rule == "none" else (Q.sign() if rule == "sign" else Q.clone()).mul_(scale)

    def _with_state(self, state: dict[str, Any], R: Tensor, group: dict[str, Any], age: int, inner: str) -> Tensor:
        beta1, beta2 = group["betas"]
        if inner == "adamw":
            m, v = adam_moments(state, R, group["betas"])
            return m / (1 - beta1**age) / ((v / (1 - beta2**age)).sqrt() + group["eps"])
        m = state.setdefault("exp_avg", torch.zeros_like(R))
        if inner == "momentum":
            return m.mul_(beta1).add_(R).clone()
        u = torch.lerp(R, m, beta1).sign()
        m.lerp_(R, 1 - beta2)
        return u

    def _draw(self, p: nn.Parameter, G: Tensor, state: dict[str, Any], period: int) -> None:
        """Choose the part with state for a period."""
        hook, name = self.method, self.names[p]
        (m, n), draw = G.shape, chance.generator(hook.seed, name, "frugal part", period)
        if hook.reset:
            for key in RESET:
                state.pop(key, None)
        if self.units:
            chosen = active(len(self.units), hook.share, hook.order, period, hook.seed)
            was, state["active"] = state.get("active"), any(name.startswith(self.units[i]) for i in chosen)
            if was and not state["active"]:
                for key in RESET:
                    state.pop(key, None)
        elif hook.part in COORDINATES:
            size = {"columns": n, "rows": m, "entries": m * n}[hook.part]
            picked = torch.randperm(size, generator=draw)[: int(hook.share * size)]
            state[hook.part] = picked.sort().values.to(G.device)
        else:
            state.update(self._basis(G, draw))

    def _basis(self, G: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
        hook = self.method
        (side,) = sides(G.shape, hook.side)
        size = G.shape[0] if side == "left" else G.shape[1]
        rank = min(round(hook.share * size), *G.shape)
        if hook.part == "svd" and rank:
            return frame_of(G, rank, hook.side)
        if hook.part == "randperm":
            P = torch.eye(size)[:, torch.randperm(size, generator=draw)[:rank]]
        else:
            P = torch.linalg.qr(torch.randn(size, rank, generator=draw)).Q
        return {side: P.contiguous().to(G.device)}
