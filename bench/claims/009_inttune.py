"""IntTune (arXiv:2502.14482): of NLoRA's three factors the middle one alone trains."""

from bench.claims.harness import Claim, With
from bench.claims.texts import Letters
from bench.claims.verdicts import at_most, below, every

CLAIM = Claim(
    number=9,
    name="inttune",
    claim="IntTune ends lower than LoRA of the same rank while it trains a small share of the numbers.",
    task=Letters(steps=200),
    contestants={
        "inttune": With("inttune(rank=4)"),
        "lora": With("lora(rank=4)"),
        "inttune of rank 16": With("inttune(rank=16)"),
        "inttune by leverage": With("inttune(rank=4, choice='leverage')"),
    },
    rates=(3e-3, 1e-2, 3e-2, 1e-1),
    seeds=3,
    rule=every(below("inttune", "lora"), at_most("inttune", 250, on="parameters")),
    note="The paper has 1.25 % of LoRA's numbers, at rank 128 on matrices of 4096; here it is 2.6 %.",
)

if __name__ == "__main__":
    CLAIM.main()
