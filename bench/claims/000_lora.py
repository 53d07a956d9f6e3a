"""LoRA (arXiv:2106.09685): a low rank is enough."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

CLAIM = Claim(
    number=0,
    name="lora",
    claim="LoRA of a small rank is as accurate as full fine-tuning: within two points.",
    task=Digits(),
    contestants={
        "lora": With("lora(rank=4, alpha=8)"),
        "full": With("full"),
        "lora of rank 1": With("lora(rank=1, alpha=2)"),
        "lora of rank 16": With("lora(rank=16, alpha=32)"),
    },
    rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    seeds=5,
    rule=above("lora", "full", by=-0.02),
)

if __name__ == "__main__":
    CLAIM.main()
