"""MoS (arXiv:2410.00938): LoRA pairs put together from shards that all layers share."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

DEEP = Digits(net="residual", widths=(64, *[128] * 7, 10), epochs=30)
SITES = {"sites": "blocks.*"}

CLAIM = Claim(
    number=11,
    name="mos",
    claim="At LoRA's number of parameters, shards shared among the layers give a higher accuracy.",
    task=DEEP,
    contestants={
        "mos": With("mos(rank=2, active=8, private=0, shards=2, alpha=16)", **SITES),
        "lora": With("lora(rank=2, alpha=4)", **SITES),
        "lora of twice the size": With("lora(rank=4, alpha=8)", **SITES),
    },
    rates=(5e-3, 1e-2, 2e-2, 4e-2),
    seeds=5,
    rule=above("mos", "lora"),
)

if __name__ == "__main__":
    CLAIM.main()
