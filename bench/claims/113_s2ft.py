"""S²FT (arXiv:2412.06289): whole heads and channels train, and the model forgets less."""

from bench.claims.harness import Claim, With
from bench.claims.texts import Letters
from bench.claims.verdicts import below, every

SITES = {"sites": ["o_proj", "down_proj"]}

CLAIM = Claim(
    number=113,
    name="s2ft",
    claim="At LoRA's number of parameters S²FT ends at a lower loss and loses less of what the model could do.",
    task=Letters(),
    contestants={
        "s2ft": With("s2ft(o=0.125, d=0.1)", **SITES),
        "lora": With("lora(rank=4, alpha=8)", **SITES),
        "full": With("full", **SITES),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=3,
    rule=every(below("s2ft", "lora"), below("s2ft", "lora", on="kept")),
    note="kept is the loss on the base's own task.",
)

if __name__ == "__main__":
    CLAIM.main()
