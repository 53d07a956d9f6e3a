"""(IA)³ (arXiv:2205.05638): features scaled by learned vectors."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

CLAIM = Claim(
    number=0,
    name="ia3",
    claim="Scaling features with fewer numbers than LoRA of rank 1 is more accurate than LoRA.",
    task=Digits(),
    contestants={
        "ia3": With("ia3"),
        "lora of rank 1": With("lora(rank=1, alpha=2)"),
        "lora": With("lora(rank=4, alpha=8)"),
    },
    rates=(3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    seeds=5,
    rule=above("ia3", "lora"),
    note="The paper's comparison is with a few examples of language tasks and further losses.",
)

if __name__ == "__main__":
    CLAIM.main()
