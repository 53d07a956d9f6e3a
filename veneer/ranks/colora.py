"""CoLoRA: ranks by what each layer contributes to a short full fine-tune on the task."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from veneer.core.hook import Plan, Ranks
from veneer.core.registry import method
from veneer.core.site import Site, stored
from veneer.errors import UserError
from veneer.fields import At
from veneer.models import architecture
from veneer.parts.attach import attach
from veneer.parts.attribution import Loss, base_weights, contributions, fine_tuned, loss_at, own_loss
from veneer.parts.modes import in_mode

HALVINGS = 60  # of the interval for α


def squares(outputs: Any, batch: Any) -> Tensor:
    """The squared error of an image network's output to the clean image, summed over a batch."""
    image = getattr(outputs, "image", None)
    if image is None:
        raise UserError(f"colora(error='squares') compares images, and the model gives a {type(outputs).__name__}")
    return (image - batch["labels"]).square().sum()


def ranks(scores: list[float], shapes: list[tuple[int, int]], budget: float, beta: float) -> list[int]:
    """The rank of each layer (out, in): δ = min(1, α·(c/max c)^β) of dk/(d + k), rounded, with the largest α whose
    Σ r(d + k) keeps the budget.

    A layer with c > 0 has rank 1 at least and min(d, k) at most; one with c = 0 has none. Where even ranks of 1 are
    too much, the layers that contribute least go without. When no layer contributes, all get one rank.
    """
    top = max(scores)
    if not top > 0:
        return [min(int(budget // sum(map(sum, shapes))), d, k) for d, k in shapes]
    shares = [(c / top) ** beta if c > 0 else 0.0 for c in scores]
    for place in sorted(range(len(shares)), key=lambda i: scores[i]):
        if sum(sum(s) for s, share in zip(shapes, shares) if share) <= budget:
            break
        shares[place] = 0.0

    def at(alpha: float) -> list[int]:
        full = (min(1.0, alpha * share) * d * k / (d + k) for share, (d, k) in zip(shares, shapes))
        return [min(max(round(f), 1), d, k) if share else 0 for f, share, (d, k) in zip(full, shares, shapes)]

    low, high = 0.0, 1 / min((s for s in shares if s), default=1.0)
    if _size(at(high), shapes) <= budget:
        return at(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _size(at(middle), shapes) <= budget else (low, middle)
    return at(low)


def _size(given: list[int], shapes: list[tuple[int, int]]) -> int:
    return sum(r * (d + k) for r, (d, k) in zip(given, shapes))


@method("colora", axis="ranks", paper="arXiv:2408.01099", system=4, wants=("pair",), defaults="lora")
class CoLoRA(Ranks):
    """Contribution-based low-rank adaptation: more rank where full tuning would do more (Park et al. 2024).

    θ̄ are the weights as given and θ those after a short full fine-tune on the calibration batches. Of each number the
    contribution is F = |(θ̄ − θ)·(1/N)Σ_k ∂L(θ(a_k))/∂θ| along the path between them (FAIG: Xie et al. 2021), of a
    layer c_i the mean F of its weight. δ_i = min(1, α·(c_i/max c)^β) is the layer's share of learnable numbers and
    r_i = round(δ_i·dk/(d + k)), at least 1, with the largest α that keeps the budget.

    Biases and norms train whole, as their contribution a number is higher than that of weights; ``biases=False`` leaves
    them frozen. The scale is what α/r of the form's fields is, at every site. The contributions, of biases too, stand
    in ``contributions`` by tensor.

    Defaults: N = 100 as in FAIG. ``budget=0.07`` is the paper's share of the layers' weights; by default it is what the
    form's rank would take at every site, so that uniform ranks compare at equal size. The paper's map from contribution
    to rank, its scale and rates are not public: the map, β = ½ and 100 steps at 3e-4 are this implementation's choice.
    L is the model's own loss and absolute values are taken batch by batch; ``error="squares"`` with batches of one
    image is FAIG's. Cheaper: ``points=1`` (one gradient, at θ), ``target="lora"`` (θ from LoRA of rank 8).

    The model is in eval mode throughout, so dropout is off and running statistics stay. Costs two copies of the weights
    in fp32 and N passes per batch, once. The paper's PROD pre-training is training on ``data.degradations.prod``.
    """

    budget: Annotated[
        float | None, At(gt=0, le=1, doc="share of the adapted layers' weights; None: as much as one rank everywhere")
    ] = None
    beta: Annotated[float, At(ge=0, doc="β, how strongly contributions count; 0: not at all")] = 0.5
    points: Annotated[int, At(ge=1, doc="N, gradients along the path")] = 100
    target: Annotated[Literal["full", "lora"], At(doc="what is tuned to find where the weights want to go")] = "full"
    steps: Annotated[int, At(ge=1, doc="steps of that tuning", unit="steps")] = 100
    lr: Annotated[float, At(gt=0, doc="its learning rate")] = 3e-4
    error: Annotated[Literal["task", "squares"], At(doc="L: the model's own loss, or the squared error of images")] = (
        "task"
    )
    biases: Annotated[bool, At(doc="train biases and norms whole")] = True

    contributions: dict[str, float]

    def trains(self, model: nn.Module) -> list[str]:
        """The biases and the norms' tensors."""
        if not self.biases:
            return []
        modules = dict(architecture.named_modules(model))
        roles = {n: architecture.role(n, modules[n.rpartition(".")[0]], model) for n in base_weights(model)}
        return [n for n, role in roles.items() if role in ("bias", "norm")]

    def survey(self, model: nn.Module, sites: list[Site], batches: list[Any]) -> None:
        """Tune, and find what the change of every tensor contributed; the model does not move."""
        odd = next((s for s in sites if stored(s.module) or s.kind == "module"), None)
        if odd is not None:
            raise UserError(f"colora tunes dense weights to see which matter, and {odd.path} holds none")
        loss = squares if self.error == "squares" else own_loss
        with in_mode(model):
            old = {n: p.float() for n, p in base_weights(model).items()}
            if self.target == "full":
                new = fine_tuned(model, batches, self.steps, self.lr, loss)
            else:
                new = self._by_lora(model, sites, batches, loss)
            found = contributions(model, old, new, batches, self.points, loss)
        self.contributions = {n: float(f.mean()) for n, f in found.items()}
        names = _names(model)
        dense = {s.path: _view(s, found[names[id(s.module.weight)]]) for s in sites}
        self._scores = {path: float(f.mean()) for path, f in dense.items()}

    def plan(self, sites: list[Site], evidence: Any, form: dict[str, Any]) -> Plan:
        """The rank of every site, None where nothing is left."""
        shapes = [(s.out_features, s.in_features) for s in sites]
        budget = sum(map(sum, shapes)) * form["rank"]
        if self.budget is not None:
            budget = self.budget * sum(math.prod(s) for s in shapes)
        plan: Plan = {}
        for site, rank in zip(sites, ranks([self._scores[s.path] for s in sites], shapes, budget, self.beta)):
            plan[site.path] = {"rank": rank} if rank else None
            if rank and form.get("alpha") is not None:
                plan[site.path]["alpha"] = form["alpha"] * rank / form["rank"]
        return plan

    def _by_lora(self, model: nn.Module, sites: list[Site], batches: list[Any], loss: Loss) -> dict[str, Tensor]:
        """The weights after tuning pairs of rank 8 at the sites."""
        adapter = attach(model, "lora", rank=8, sites=[s.path for s in sites], name="colora-target", seed=self.seed)
        try:
            optimizer = torch.optim.AdamW(adapter.parameters(), lr=self.lr, weight_decay=0.0)
            for step in range(self.steps):
                batch = batches[step % len(batches)]
                gradients = torch.autograd.grad(loss_at(model, {}, batch, loss), adapter.parameters())
                for p, g in zip(adapter.parameters(), gradients):
                    p.grad = g
                optimizer.step()
            tuned = {n: p.float().clone() for n, p in base_weights(model).items()}
            names = _names(model)
            for d in adapter.deltas.values():
                _view(d.site, tuned[names[id(d.site.module.weight)]]).add_(d.weight().detach())
            return tuned | {path: w.parameter().detach().clone() for path, w in adapter.trained.items()}
        finally:
            adapter.remove()

    def state_dict(self) -> dict[str, Any]:
        return {"contributions": getattr(self, "contributions", {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.contributions = state.get("contributions", {})


def _names(model: nn.Module) -> dict[int, str]:
    """The name of every parameter; a tied one has its first."""
    return {id(p): n for n, p in model.named_parameters()}


def _view(site: Site, weight: Tensor) -> Tensor:
    """The rows of a site in a tensor that lies as the layer's weight does, as (out, in)."""
    dense = weight.T if site.transposed else weight.flatten(1)
    return dense if site.rows is None else dense[site.rows]
