"""MoSA (arXiv:2312.02923): an adapter trained as sparse modules, one drawn for each step, and merged."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above, every

NET = {"net": "vit", "widths": (64, 48, 10), "epochs": 20, "shots": 100}
INVERT, ROTATE = Digits(change="invert", **NET), Digits(change="rotate", **NET)
MOSA = "mosa(rank=16, scaling=0.5)"
PLAIN = "mosa(rank=16, scaling=0.5, modules=1)+mosa-consistency(weight=0.0)"

CLAIM = Claim(
    number=96,
    name="mosa",
    claim="With few images MoSA ends at a higher accuracy than the same adapter trained whole, and than LoRA.",
    task=INVERT,
    contestants={
        "mosa": MOSA,
        "adapter": PLAIN,
        "lora": With("lora(rank=4)"),
        "mosa, turned": With(MOSA, task=ROTATE),
        "adapter, turned": With(PLAIN, task=ROTATE),
    },
    rates=(3e-3, 1e-2, 3e-2),
    seeds=3,
    rule=every(above("mosa", "adapter"), above("mosa", "lora"), above("mosa, turned", "adapter, turned")),
    note="The adapter is MoSA with one module: the same form, norm and dropout. Inverted digits, and turned ones.",
)

if __name__ == "__main__":
    CLAIM.main()
