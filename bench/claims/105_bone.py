"""Bone (arXiv:2409.15371): one trained matrix for each layer learns faster, and ends higher, than a pair."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above, every

SITES = {"sites": ["layers.0", "layers.1"]}

CLAIM = Claim(
    number=105,
    name="bone",
    claim="At LoRA's number of parameters Bone ends at a higher accuracy than LoRA and PiSSA.",
    task=Digits(),
    contestants={
        "bone": With("bone(rank=8)", **SITES),
        "bat": With("bat(rank=8)", **SITES),
        "lora": With("lora(rank=5, alpha=10)", **SITES),
        "pissa": With("lora(rank=5)+pissa", **SITES),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=3,
    rule=every(above("bone", "lora"), above("bone", "pissa")),
    note=(
        "The first two layers alone: blocks of BAT must divide both sides. 'bone' is the form of the paper's later "
        "versions (MiSS), 'bat' that of the first."
    ),
)

if __name__ == "__main__":
    CLAIM.main()
