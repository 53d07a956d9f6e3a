"""BA-LoRA (arXiv:2408.04556): terms against what a model inherits, beside LoRA and PiSSA without them."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above, every

CLAIM = Claim(
    number=6,
    name="ba-lora",
    claim="BA-LoRA ends at a higher accuracy than LoRA and than PiSSA, from which it starts.",
    task=Digits(widths=(64, 128, 128, 10), shots=60, epochs=75),
    contestants={
        "ba-lora": With("lora+pissa+ba-lora", rank=4),
        "lora": With("lora", rank=4),
        "pissa": With("lora+pissa", rank=4),
        "diversity alone": With("lora+pissa+ba-lora(consistency=0.0, svd=0.0)", rank=4),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    seeds=8,
    rule=every(above("ba-lora", "lora"), above("ba-lora", "pissa")),
)

if __name__ == "__main__":
    CLAIM.main()
