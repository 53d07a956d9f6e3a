"""SaRA (arXiv:2409.06633): the smallest weights are idle."""

import torch

from bench.claims.harness import Claim, Trial, With, nothing
from bench.claims.tasks import Digits
from bench.claims.verdicts import level
from veneer.core.site import find_sites
from veneer.deltas.sara import quantile

SHARE = 0.2


@torch.no_grad()
def smallest(trial: Trial) -> None:
    """Zero the smallest fifth of all weights."""
    weights = [s.weight() for s in find_sites(trial.model, "all")]
    limit = quantile(weights, SHARE)
    for W in weights:
        W.masked_fill_(W.abs() < limit, 0)


@torch.no_grad()
def at_random(trial: Trial) -> None:
    """Zero a fifth of all weights at random."""
    draw = torch.Generator().manual_seed(trial.seed)
    for site in find_sites(trial.model, "all"):
        W = site.weight()
        W.masked_fill_(torch.rand(W.shape, generator=draw) < SHARE, 0)


CLAIM = Claim(
    number=22,
    name="sara-idle",
    claim="The tenth to fifth of the weights that is smallest contributes nothing to what a trained model does.",
    task=Digits(change="none"),
    contestants={
        "smallest zeroed": With(function=smallest),
        "base": With(function=nothing),
        "random zeroed": With(function=at_random),
    },
    rates=(0,),
    seeds=5,
    rule=level("smallest zeroed", "base", margin=0.01),
    note="A fifth is zeroed. Nothing trains; the score is the base's own task.",
)

if __name__ == "__main__":
    CLAIM.main()
