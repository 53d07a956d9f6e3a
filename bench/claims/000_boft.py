"""BOFT (arXiv:2311.06243): orthogonal matrices as products of sparse ones, in the manner of butterflies."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

CLAIM = Claim(
    number=0,
    name="boft",
    claim="At about as many free numbers BOFT is more accurate than OFT, whose blocks never meet.",
    task=Digits(),
    contestants={
        "boft": With("boft(block_size=4, factors=2)"),
        "oft": With("oft(block_size=8)"),
        "lora": With("lora(rank=4, alpha=8)"),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    seeds=3,
    rule=above("boft", "oft"),
    note="BOFT's file holds whole blocks of 4 × 4, of which six numbers act: 1,728, and a scale for each of 522 "
    "outputs, against OFT's 2,016.",
)

if __name__ == "__main__":
    CLAIM.main()
