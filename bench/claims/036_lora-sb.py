"""LoRA-SB (arXiv:2411.19557): r² numbers on bases that begin where full fine-tuning would."""

from bench.claims.harness import Claim, With
from bench.claims.texts import Letters
from bench.claims.verdicts import below, every

CLAIM = Claim(
    number=36,
    name="lora-sb",
    claim="LoRA-SB ends lower than LoRA-XS of its size, and than LoRA with 27 to 90 times its parameters.",
    task=Letters(steps=200),
    contestants={
        "lora-sb": With("lora-sb+lora-xs(rank=4)"),
        "lora-xs": With("lora-xs(rank=4)"),
        "lora": With("lora(rank=4)"),
        "lora-sb of the gradient": With("lora-sb(update='gradient')+lora-xs(rank=4)"),
    },
    rates=(3e-3, 1e-2, 3e-2, 1e-1),
    seeds=3,
    rule=every(below("lora-sb", "lora-xs"), below("lora-sb", "lora")),
    note="At rank 4 LoRA trains 39 times as many numbers. η₁ is 1e-4, or what the guard leaves of it.",
)

if __name__ == "__main__":
    CLAIM.main()
