"""LoKr (arXiv:2309.14859): Kronecker products, of a high rank at few parameters."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

CLAIM = Claim(
    number=0,
    name="lokr",
    claim="LoKr is more accurate than LoRA at more than its own number of parameters.",
    task=Digits(),
    contestants={
        "lokr": With("lokr(rank=4, alpha=4)"),
        "loha": With("loha(rank=4, alpha=4)"),
        "lora": With("lora(rank=8, alpha=16)"),
        "lora of rank 1": With("lora(rank=1, alpha=2)"),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    seeds=5,
    rule=above("lokr", "lora of rank 1"),
)

if __name__ == "__main__":
    CLAIM.main()
