"""LoHa and LoKr (arXiv:2108.06098, arXiv:2309.14859): products of small matrices that have a high rank."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above, every

CLAIM = Claim(
    number=0,
    name="lokr",
    claim="LoHa is more accurate than LoRA at as many parameters, and LoKr than LoRA at more than its own.",
    task=Digits(),
    contestants={
        "loha": With("loha(rank=4, alpha=4)"),
        "lokr": With("lokr(rank=4, alpha=4)"),
        "lora": With("lora(rank=8, alpha=16)"),
        "lora of rank 1": With("lora(rank=1, alpha=2)"),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=5,
    rule=every(above("loha", "lora"), above("lokr", "lora of rank 1")),
)

if __name__ == "__main__":
    CLAIM.main()
