"""DiffoRA (arXiv:2502.08905): the layers that a search picks are better places for pairs than random ones."""

import torch

from bench.claims.harness import Claim, Trial, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

SITES = ["blocks.*"]


def random_choice(trial: Trial) -> None:
    """The same run with scores that are drawn and never learned."""
    adapter = trial.attach("diffora+diffora-ranks(waiting=0.999)", rank=2, sites=SITES)
    (hook,) = adapter.hooks
    hook.scores["a"].data.copy_(torch.randn(8, generator=torch.Generator().manual_seed(100 + trial.seed)))
    hook.apply()
    trial.fit(adapter)


def random_layers(trial: Trial) -> None:
    """LoRA on four random layers and nothing elsewhere."""
    order = torch.randperm(8, generator=torch.Generator().manual_seed(100 + trial.seed)).tolist()
    trial.fit(trial.attach("lora", rank=2, alpha=4, sites=[f"blocks.{i}" for i in sorted(order[:4])]))


CLAIM = Claim(
    number=23,
    name="diffora",
    claim="With a pair of their own at half of the layers and a shared one at the others, the layers that the search "
    "picks end at a higher accuracy than random ones.",
    task=Digits(net="residual", widths=(64, *(64,) * 9, 10), change="pixels", shots=800, epochs=28),
    contestants={
        "diffora": With("diffora", rank=2, sites=SITES),
        "random choice": With(function=random_choice),
        "random layers": With(function=random_layers),
        "lora": With("lora", rank=2, alpha=4, sites=SITES),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=8,
    rule=above("diffora", "random choice"),
    note="`random layers` shares nothing and trains for the whole run, as does `lora` at all layers; DiffoRA spends "
    "0.4 of its steps on the search and starts anew.",
)

if __name__ == "__main__":
    CLAIM.main()
