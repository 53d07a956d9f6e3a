"""LoHa (arXiv:2108.06098): the entrywise product of two low ranks has the product of their ranks."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

CLAIM = Claim(
    number=0,
    name="loha",
    claim="LoHa is more accurate than LoRA at as many parameters.",
    task=Digits(),
    contestants={
        "loha": With("loha(rank=4, alpha=4)"),
        "lora": With("lora(rank=8, alpha=16)"),
        "lora of rank 4": With("lora(rank=4, alpha=8)"),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    seeds=5,
    rule=above("loha", "lora"),
)

if __name__ == "__main__":
    CLAIM.main()
