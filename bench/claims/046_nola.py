"""NOLA (arXiv:2310.02556): factors mixed from random matrices go below the size of LoRA's rank one."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above, below, every

CLAIM = Claim(
    number=46,
    name="nola",
    claim="With half of the parameters of rank-one LoRA, or fewer, NOLA is as accurate.",
    task=Digits(),
    contestants={
        "nola": With("nola(bases=64, rank=4)"),
        "nola of 32": With("nola(bases=32, rank=4)"),
        "lora": With("lora(rank=1, alpha=2)"),
    },
    rates=(3e-3, 1e-2, 3e-2, 1e-1),
    seeds=5,
    rule=every(above("nola", "lora", by=-0.02), below("nola", "lora", on="parameters", by=500)),
    note="As accurate: no more than two points below, with 95 % confidence.",
)

if __name__ == "__main__":
    CLAIM.main()
