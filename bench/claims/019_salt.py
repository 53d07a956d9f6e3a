"""SALT (arXiv:2503.16055): scaled leading singular values and a low-rank block for the others."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above, every

CLAIM = Claim(
    number=19,
    name="salt",
    claim="SALT ends at a higher accuracy than LoRA of more parameters and than tuning singular values alone.",
    task=Digits(),
    contestants={
        "salt": With("salt(rank=4)"),
        "the matrix clipped": With("salt(rank=4, clip='matrix')"),
        "values alone": With("salt(ratio=1.0)"),
        "values alone, unclipped": With("salt(ratio=1.0, clip='none')"),
        "lora": With("lora(rank=4, alpha=8)"),
    },
    rates=(3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    seeds=5,
    rule=every(above("salt", "lora"), above("salt", "values alone"), above("salt", "values alone, unclipped")),
    note="The clipped matrix is the official code's form; LoRA has 1.8 times SALT's parameters.",
)

if __name__ == "__main__":
    CLAIM.main()
