"""M-FAC (arXiv:2107.03356): steps by the inverse Fisher matrix of the last m gradients."""

from bench.claims.harness import Claim
from bench.claims.tasks import Digits
from bench.claims.verdicts import above, below, every

CLAIM = Claim(
    number=71,
    name="m-fac",
    claim="At the same number of steps M-FAC ends at a lower training loss and a higher accuracy than Adam.",
    task=Digits(change="none", pretrained=False, widths=(64, 32, 32, 10), shots=800, epochs=12, batch=64),
    contestants={
        "m-fac": "full+m-fac(window=128)",
        "m = 32": "full+m-fac(window=32)",
        "λ = 0.1": "full+m-fac(window=128, damping=0.1)",
        "λ = 1e-5": "full+m-fac(window=128, damping=1e-5)",
        "adamw": "full",
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    seeds=8,
    rule=every(below("m-fac", "adamw", on="train_loss"), above("m-fac", "adamw")),
    note="From scratch, weights alone; `m-fac` has λ = 1e-3.",
)

if __name__ == "__main__":
    CLAIM.main()
