"""Prompt tuning (arXiv:2104.08691): soft tokens, and where they start."""

import math

from bench.claims.harness import Claim, With
from bench.claims.texts import LETTERS, Letters
from bench.claims.verdicts import below, once_learned

CLAIM = Claim(
    number=0,
    name="prompt",
    claim="In a small model soft tokens that start as words of its vocabulary end lower than random ones.",
    task=Letters(),
    contestants={
        "prompt": With("prompt(length=10)"),
        "prompt, uniform": With("prompt(length=10, start='uniform')"),
        "lora": With("lora(rank=4)"),
    },
    rates=(3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    seeds=3,
    sweep_seeds=1,
    rule=once_learned("prompt", math.log(LETTERS), below("prompt", "prompt, uniform")),
    note="That prompts equal training the whole model is the paper's claim for ten thousand million parameters; LoRA "
    "stands here for how far away that is.",
)

if __name__ == "__main__":
    CLAIM.main()
