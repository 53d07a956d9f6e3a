"""LoLDU (arXiv:2410.13618): the pivots of W train, and nothing else."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

CLAIM = Claim(
    number=2,
    name="loldu",
    claim="The diagonal of an LDU factorisation adapts as well as LoRA with many times its parameters.",
    task=Digits(),
    contestants={
        "loldu": With("loldu"),
        "lora": With("lora(rank=4, alpha=8)"),
        "lora of rank 1": With("lora(rank=1, alpha=2)"),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    seeds=5,
    rule=above("loldu", "lora", by=-0.02),
    note="As well: no more than two points below, with 95 % confidence. LoRA of rank 4 has 13 times the parameters.",
)

if __name__ == "__main__":
    CLAIM.main()
