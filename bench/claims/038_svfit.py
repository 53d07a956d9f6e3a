"""SVFit (arXiv:2409.05926): singular values of W train, and nothing else."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

CLAIM = Claim(
    number=38,
    name="svfit",
    claim="Training singular values ends at a higher accuracy than LoRA with 16 times their number of parameters.",
    task=Digits(),
    contestants={
        "svfit": With("svfit"),
        "lora": With("lora(rank=5, alpha=10)"),
        "lora of rank 1": With("lora(rank=1, alpha=2)"),
    },
    rates=(3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    seeds=5,
    rule=above("svfit", "lora"),
    note="LoRA of rank 5 has 16.6 times the parameters of all singular values.",
)

if __name__ == "__main__":
    CLAIM.main()
