"""LoRA-XS (arXiv:2405.17604): r² numbers a layer between W's singular vectors."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

CLAIM = Claim(
    number=0,
    name="lora-xs",
    claim="LoRA-XS with fewer parameters than LoRA of rank 1 is more accurate.",
    task=Digits(),
    contestants={
        "lora-xs": With("lora-xs(rank=8)"),
        "lora of rank 1": With("lora(rank=1, alpha=2)"),
        "lora": With("lora(rank=4, alpha=8)"),
    },
    rates=(3e-3, 1e-2, 3e-2, 1e-1),
    seeds=5,
    rule=above("lora-xs", "lora of rank 1"),
)

if __name__ == "__main__":
    CLAIM.main()
