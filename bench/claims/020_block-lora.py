"""Block-LoRA (arXiv:2501.16720): arms that share one down-projection."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above, every, level

CLAIM = Claim(
    number=20,
    name="block-lora",
    claim="Arms that share A are as accurate as LoRA of their nominal rank with fewer parameters; and, as the sheet "
    "proves, they are LoRA of the block's rank with a faster B.",
    task=Digits(),
    contestants={
        "block-lora": With("block-lora(rank=8, blocks=2, scale_rule='alpha_over_r', materialise_arms=True)", alpha=16),
        "one arm for all": With("block-lora(rank=8, blocks=2, scale_rule='alpha_over_r')", alpha=16),
        "lora of rank 4, B at twice the rate": With("lora(rank=4, alpha=8)+lora-plus(ratio=2)"),
        "lora of rank 8": With("lora(rank=8, alpha=16)"),
        "lora of rank 4": With("lora(rank=4, alpha=8)"),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=5,
    rule=every(
        above("block-lora", "lora of rank 8", by=-0.02),
        level("block-lora", "one arm for all", 1e-6, on="train_loss"),
        level("block-lora", "lora of rank 4, B at twice the rate", 1e-6, on="train_loss"),
    ),
    note="As accurate: no more than two points below, with 95 % confidence. All have s = 2 on what they add up.",
)

if __name__ == "__main__":
    CLAIM.main()
