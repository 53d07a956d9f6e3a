"""OFT (arXiv:2306.07280): turning what a layer gets keeps the angles between its rows."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above, every

CLAIM = Claim(
    number=0,
    name="oft",
    claim="At half of LoRA's parameters OFT is more accurate, and keeps more of what the model could do.",
    task=Digits(),
    contestants={
        "oft": With("oft(block_size=8)"),
        "oft of PEFT's series": With("oft(block_size=8, cayley_neumann=True)"),
        "lora": With("lora(rank=4, alpha=8)"),
        "boft": With("boft(block_size=4)"),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    seeds=5,
    rule=every(above("oft", "lora"), above("oft", "lora", on="kept")),
    note="kept is the accuracy on upright images.",
)

if __name__ == "__main__":
    CLAIM.main()
