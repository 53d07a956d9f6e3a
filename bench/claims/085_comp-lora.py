"""Comp-LoRA (arXiv:2501.15040): LoRA outside the principal directions of W."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above, every

CLAIM = Claim(
    number=85,
    name="comp-lora",
    claim="Outside the principal directions of W LoRA learns the new task better and keeps more of the old one.",
    task=Digits(),
    contestants={
        "comp-lora": With("comp-lora(rank=4, alpha=8)"),
        "half the energy": With("comp-lora(rank=4, alpha=8, energy=0.5)"),
        "projected steps": With("lora(rank=4, alpha=8)+comp-lora-steps"),
        "lora": With("lora(rank=4, alpha=8)"),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=5,
    rule=every(above("comp-lora", "lora"), above("comp-lora", "lora", on="kept")),
    note="Rates are chosen by the new task alone. Energy is 0.9 where it is not said.",
)

if __name__ == "__main__":
    CLAIM.main()
