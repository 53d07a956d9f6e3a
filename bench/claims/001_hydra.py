"""Hydra (arXiv:2309.06922): a branch on the layer's output beside LoRA's on its input."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

CLAIM = Claim(
    number=1,
    name="hydra",
    claim="At LoRA's number of parameters Hydra's parallel and sequential branches together end at a higher accuracy.",
    task=Digits(),
    contestants={"hydra": With("hydra(rank=2, scaling=2)"), "lora": With("lora", rank=4, alpha=8)},
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=5,
    rule=above("hydra", "lora"),
)

if __name__ == "__main__":
    CLAIM.main()
