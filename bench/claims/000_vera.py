"""VeRA (arXiv:2310.11454): two vectors a layer around shared random projections."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

CLAIM = Claim(
    number=0,
    name="vera",
    claim="VeRA with a quarter of LoRA's parameters is as accurate: within two points.",
    task=Digits(),
    contestants={
        "vera": With("vera(rank=256)"),
        "lora": With("lora(rank=4, alpha=8)"),
        "lora of rank 1": With("lora(rank=1, alpha=2)"),
    },
    rates=(3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    seeds=5,
    rule=above("vera", "lora", by=-0.02),
)

if __name__ == "__main__":
    CLAIM.main()
