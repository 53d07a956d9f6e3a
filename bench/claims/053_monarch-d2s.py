"""Monarch (arXiv:2204.00595): pretrained weights projected to Monarch matrices and fine-tuned."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above, every

HIDDEN = {"sites": ["layers.0", "layers.1"], "train": ["layers.2", "layers.0.bias", "layers.1.bias"]}

CLAIM = Claim(
    number=53,
    name="monarch-d2s",
    claim="A pretrained network whose weights are projected to Monarch matrices fine-tunes to the dense accuracy; "
    "the projection is worth more than a random start.",
    task=Digits(),
    contestants={
        "projected": With("monarch(blocks=16, replace=True)", **HIDDEN),
        "random start": With("monarch(blocks=16, replace=True, start='random')", **HIDDEN),
        "dense": With("full"),
        "lora": With("lora(rank=4, alpha=8)"),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=5,
    rule=every(above("projected", "dense", by=-0.02), above("projected", "random start")),
    note="The dense accuracy: no more than two points below, with 95 % confidence. Both hidden layers become 16 × 16 "
    "blocks, an eighth and a third of their numbers.",
)

if __name__ == "__main__":
    CLAIM.main()
