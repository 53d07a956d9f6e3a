"""PaCA (arXiv:2503.01905): a few columns of W itself train, so that a layer keeps little for the backward pass."""

from bench.claims.harness import Claim, With, kept_bytes
from bench.claims.tasks import Digits
from bench.claims.verdicts import above, below, every

CLAIM = Claim(
    number=92,
    name="paca",
    claim="At LoRA's number of parameters PaCA is as accurate and keeps fewer bytes for the backward pass.",
    task=Digits(),
    contestants={"paca": With("paca(rank=8)"), "lora": With("lora(rank=4, alpha=8)")},
    rates=(3e-3, 1e-2, 3e-2, 1e-1),
    seeds=5,
    measures={"kept_bytes": kept_bytes},
    rule=every(above("paca", "lora", by=-0.02), below("paca", "lora", on="kept_bytes")),
    note="As accurate: no more than two points below, with 95 % confidence.",
)

if __name__ == "__main__":
    CLAIM.main()
