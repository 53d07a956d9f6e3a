"""MAN (arXiv:2407.05623): a slow copy of the next block's first layer mends the short sight of local learning."""

from itertools import pairwise

from torch import Tensor, nn

from bench.claims.harness import Claim
from bench.claims.tasks import NETS, Classifier, Digits
from bench.claims.verdicts import below, every


class Layer(nn.Module):
    """h + V relu(U norm(h))."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.inner(h)


class Tower(Classifier):
    """``stem``, residual ``layers.0`` … and ``head``; widths: (64, d, …, d, 10)."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Linear(*widths[:2])
        self.layers = nn.ModuleList(Layer(d) for d, _ in pairwise(widths[1:-1]))
        self.head = nn.Linear(*widths[-2:])

    def logits(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


NETS["tower"] = Tower
DEPTH, FORM = 8, "full(norms=True)"

CLAIM = Claim(
    number=144,
    name="man",
    claim="Between blocks that learn apart, MAN's auxiliary networks close most of the gap to end-to-end training.",
    task=Digits(
        net="tower",
        widths=(64, *[48] * (DEPTH + 1), 10),
        change="none",
        shots=600,
        epochs=13,
        pretrained=False,
        score="loss",
    ),
    contestants={
        "man": f"{FORM}+man(blocks={DEPTH})",
        "local": f"{FORM}+man(blocks={DEPTH}, auxiliary='none')",
        "end to end": FORM,
    },
    rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    seeds=3,
    rule=every(below("man", "local"), below("man", "end to end", by=-0.02)),
    note="A residual MLP of eight layers, each a local block; local is the same head at each block's own output. "
    "Most of the gap: no more than 0.02 nats above end to end, with 95 % confidence.",
)

if __name__ == "__main__":
    CLAIM.main()
