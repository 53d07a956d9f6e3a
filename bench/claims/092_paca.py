"""PaCA (arXiv:2503.01905): a few columns of W itself train, so that a layer keeps little for the backward pass."""

from bench.claims.harness import Claim, With, kept_bytes
from bench.claims.tasks import Digits
from bench.claims.texts import Letters
from bench.claims.verdicts import above, below, every

PACA, LORA = "paca(rank=8)", "lora(rank=4, alpha=8)"

CLAIM = Claim(
    number=92,
    name="paca",
    claim="At LoRA's number of parameters PaCA is as accurate and keeps fewer bytes for the backward pass.",
    task=Digits(),
    contestants={
        "paca": PACA,
        "lora": LORA,
        "paca on letters": With(PACA, task=Letters()),
        "lora on letters": With(LORA, task=Letters()),
    },
    rates=(3e-3, 1e-2, 3e-2, 1e-1),
    seeds=3,
    measures={"kept_bytes": kept_bytes},
    rule=every(above("paca", "lora", by=-0.02), below("paca on letters", "lora on letters", on="kept_bytes")),
    note="As accurate: no more than two points below, with 95 % confidence. Bytes are compared on a transformer: "
    "behind a ReLU, as in the digits net, a layer's input is kept for the ReLU anyway.",
)

if __name__ == "__main__":
    CLAIM.main()
