"""KaSA (arXiv:2412.06071): an SVD-shaped update in the place of W's weakest directions."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

HIDDEN = ["layers.0", "layers.1"]

CLAIM = Claim(
    number=91,
    name="kasa",
    claim="KaSA ends at a higher accuracy than LoRA of the same rank.",
    task=Digits(),
    contestants={
        "kasa": With("kasa(rank=4, alpha=8)", sites=HIDDEN),
        "lora": With("lora(rank=4, alpha=8)", sites=HIDDEN),
        "kasa, whole W": With("kasa(rank=4, alpha=8, truncate=False)", sites=HIDDEN),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=5,
    rule=above("kasa", "lora"),
    note="The head has ten rows, of which KaSA would drop four: all contestants adapt the other two layers. The "
    "regulariser is on at its defaults.",
)

if __name__ == "__main__":
    CLAIM.main()
