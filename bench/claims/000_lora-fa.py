"""LoRA-FA (arXiv:2308.03303): A stays frozen."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

CLAIM = Claim(
    number=0,
    name="lora-fa",
    claim="With A frozen LoRA of one rank loses nothing: within two points.",
    task=Digits(),
    contestants={
        "lora-fa": With("lora-fa(rank=4, alpha=8)"),
        "lora-fa of rank 8": With("lora-fa(rank=8, alpha=16)"),
        "lora": With("lora(rank=4, alpha=8)"),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    seeds=5,
    rule=above("lora-fa", "lora", by=-0.02),
)

if __name__ == "__main__":
    CLAIM.main()
