"""Bottleneck adapters (arXiv:1902.00751): near full fine-tuning with a few per cent of its parameters."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

CLAIM = Claim(
    number=0,
    name="adapter",
    claim="Bottleneck adapters are as accurate as full fine-tuning: within two points.",
    task=Digits(net="vit", widths=(64, 48, 10), epochs=20),
    contestants={
        "adapter": With("adapter(placement='houlsby', rank=9)"),
        "parallel": With("adapter(placement='parallel', rank=9)"),
        "full": With("full"),
        "lora": With("lora(rank=4)"),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=3,
    rule=above("adapter", "full", by=-0.02),
)

if __name__ == "__main__":
    CLAIM.main()
