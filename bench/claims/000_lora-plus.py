"""LoRA+ (arXiv:2402.12354): B learns sixteen times as fast as A."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

CLAIM = Claim(
    number=0,
    name="lora-plus",
    claim="With its own rate for B, LoRA ends at a higher accuracy than at its best single rate.",
    task=Digits(),
    contestants={"lora-plus": With("lora(rank=4, alpha=8)+lora-plus"), "lora": With("lora(rank=4, alpha=8)")},
    rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    seeds=5,
    rule=above("lora-plus", "lora"),
)

if __name__ == "__main__":
    CLAIM.main()
