"""LoftQ (arXiv:2310.08659): factors that start at what quantising the base has lost."""

from bench.claims.harness import Claim, With
from bench.claims.texts import Letters
from bench.claims.verdicts import below

CLAIM = Claim(
    number=0,
    name="loftq",
    claim="On a quantised base LoftQ ends lower than LoRA that starts at zero (QLoRA).",
    task=Letters(steps=100),
    contestants={
        "loftq": With("lora(rank=4)+loftq(iterations=5)+nf4"),
        "qlora": With("lora(rank=4)+nf4"),
        "lora": With("lora(rank=4)"),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=3,
    rule=below("loftq", "qlora"),
    note="Four bits, as nf4 has; the paper's gains are largest at two.",
)

if __name__ == "__main__":
    CLAIM.main()
