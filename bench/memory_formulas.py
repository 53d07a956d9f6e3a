"""Bytes that a method should keep, from the model's config alone: what `bench.memory` counts is held against them.

Of a block of Llama's kind with N tokens, width d, inner width f, q query numbers and k key (or value) numbers a token,
every form keeps for backward, in c bytes a number,

- the stream before each norm, N·d twice, and the norms' fp32 mean squares;
- the turned queries, keys and values, N·(q + 2k), and the probabilities, of which each run of rows stops at its own
  last column; where compiled code attends, queries, keys and values as they were projected, what comes out, N·q, and an
  fp32 sum for each token and head;
- what comes out of gate and up, 2·N·f,

and beside it what its trained tensors ask for at each layer: the layer's input, or a part of it, or none. A block whose
input asks for no gradient keeps no stream before its first norm, and one before the first trained tensor keeps nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from veneer import kernels

SINGLE = 4  # bytes of a number in fp32
BLOCK, PARTS = 64, 8  # attention's rows come in runs of at least 64, at most 8 runs
QUANTUM = 256  # numbers of 8 bits that share a scale


@dataclass(frozen=True)
class Sizes:
    """Of a model of Llama's kind and a batch."""

    rows: int
    tokens: int
    blocks: int
    d: int
    f: int
    heads: int
    groups: int
    head: int
    c: int = 2
    compiled: bool = False  # whether compiled kernels run

    @classmethod
    def of(cls, config: Any, rows: int, tokens: int, c: int = 2) -> Sizes:
        """From a transformers config; ``rows`` of ``tokens``, ``c`` bytes a number, by the kernels of this machine."""
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        sides = config.hidden_size, config.intermediate_size, heads, config.num_key_value_heads, head
        return cls(rows, tokens, config.num_hidden_layers, *sides, c, c == 2 and kernels.usable())

    @property
    def N(self) -> int:
        """Tokens of the batch."""
        return self.rows * self.tokens

    @property
    def q(self) -> int:
        """Query numbers of a token."""
        return self.heads * self.head

    @property
    def k(self) -> int:
        """Key numbers of a token, and value numbers."""
        return self.groups * self.head

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """(out, in) of a block's linear layers by role."""
        d, f, q, k = self.d, self.f, self.q, self.k
        return {"q": (q, d), "k": (k, d), "v": (k, d), "o": (d, q), "gate": (f, d), "up": (f, d), "down": (d, f)}

    @property
    def norm(self) -> int:
        """A norm: its input and the mean squares."""
        return self.N * (self.d * self.c + SINGLE)

    @property
    def attention(self) -> int:
        """Queries, keys, values; probabilities, or output and sums."""
        if self.compiled:
            return self.N * (self.c * 2 * (self.q + self.k) + SINGLE * self.heads)
        size = max(BLOCK, -(-self.tokens // PARTS))
        ends = [min(a + size, self.tokens) for a in range(0, self.tokens, size)]
        looked = sum((b - a) * b for a, b in zip([0, *ends], ends))
        return self.c * (self.N * (self.q + 2 * self.k) + self.rows * self.heads * looked)

    @property
    def mlp(self) -> int:
        """Gate and up."""
        return self.c * 2 * self.N * self.f

    @property
    def turns(self) -> int:
        """Cosines and the sines of the way back, for all heads of queries and keys; once for all blocks. Compiled code,
        which turns again in backward, takes the sines of the way there too."""
        return self.c * (3 if self.compiled else 2) * self.tokens * (self.q + self.k)

    @property
    def output(self) -> int:
        """Numbers of attention's output, o's input, where it is not kept anyway."""
        return 0 if self.compiled else self.N * self.q


def trunk(s: Sizes, first: int = 0, own: int | None = None) -> int:
    """What every form keeps when ``first`` is the first block with a trained tensor; ``own`` is that block's share, all
    but the stream before its first norm when None."""
    own = s.attention + s.norm + s.mlp if own is None else own
    after = s.blocks - first - 1
    return after * (2 * s.norm + s.attention + s.mlp) + own + s.norm + s.turns


def lora(s: Sizes, rank: int, inputs: bool = True) -> int:
    """The trunk's, three inputs a block (down's is formed again), N·r at each layer and the factors in c bytes, which
    compiled code needs not."""
    shared = 2 * s.N * s.d + s.output if inputs else 0
    factors = 0 if s.compiled else sum(rank * (m + n) for m, n in s.layers.values())
    return trunk(s) + s.blocks * s.c * (shared + len(s.layers) * s.N * rank + factors)


def paca(s: Sizes, rank: int) -> int:
    """LoRA's without the inputs, of which the r columns in h are all that is asked; the choice as fp32 one-hot rows."""
    return lora(s, rank, inputs=False) + s.blocks * SINGLE * rank * sum(n for _, n in s.layers.values())


def written(s: Sizes, drawn: Collection[int] | None = None) -> int:
    """Weights that train, in the blocks ``drawn`` or in all: there the four inputs, and from the first of them on the
    weights in c bytes, as the fp32 values stand for them; without those whose input asks for no gradient."""
    first = 0 if drawn is None else min(drawn)
    inputs = (s.N * (2 * s.d + s.f) + s.output) * (s.blocks if drawn is None else len(drawn))
    weights = (s.blocks - first) * sum(m * n for m, n in s.layers.values()) - (s.q + 2 * s.k) * s.d
    return trunk(s, first) + s.c * (inputs + weights)


def s2ft(s: Sizes, columns: Sequence[tuple[int, int]]) -> int:
    """The trunk's from the first block of which something was drawn, there without attention, which lies before; and
    the drawn columns of the inputs of o and down; ``columns`` of both by block."""
    first = next(i for i, pair in enumerate(columns) if any(pair))
    own = s.norm + s.mlp if columns[first][0] else 0
    return trunk(s, first, own) + s.c * s.N * sum(sum(pair) for pair in columns)


def lst(s: Sizes, reduction: int) -> int:
    """A trunk of 1/r the widths, and beside it for each block: the input of its ladder (a hidden state of the frozen
    trunk, which is there for no backward of its own), both sides of the gate, the inputs of its four kinds of layers,
    its weights and its own turn; one ladder more at the bottom, the head of the side at the top."""
    t = replace(s, d=s.d // reduction, f=s.f // reduction, head=s.head // reduction)
    weights = sum(m * n for m, n in t.layers.values())
    block = t.N * (2 * t.d + 2 * t.d + t.f) + t.output + weights
    ladders = (s.blocks + 1) * s.N * s.d
    turns = (s.blocks - 1) * t.turns  # the others than the one in the thin trunk's own sum
    return trunk(t) + t.norm + turns + s.c * (s.blocks * block + ladders + t.N * t.d + s.d * t.d)


def sherl(s: Sizes, reduction: int, late: int = 1) -> int:
    """The late blocks of the trunk with what they read; of the n states below them the state and its reduction before
    and after the norm; of all but the last of these the unit vector, the product with the guide, their overlaps and
    seven numbers a token; the entry's own map and norm."""
    n, e = s.blocks - late + 1, s.d // reduction
    tokens = n * s.d + 2 * n * e + (n - 1) * (2 * e + n - 1 + 7) + e + s.d + 2 * (n + 1) + 1
    return trunk(s, s.blocks - late) + s.norm + s.c * (s.N * tokens + s.d * e + (2 * n + 1) * e + 2 * s.d)


def state(label: str, shape: tuple[int, ...]) -> float:
    """Bytes of optimiser state for one trained tensor, by the sheets' formulas: two moments of the tensor, of its
    projection with the basis (GaLore), or of a quarter of its columns with their numbers (FRUGAL)."""
    size = prod(shape)
    if len(shape) < 2 or label.split(",")[0] not in ("galore", "fira", "owlore", "frugal"):
        return SINGLE * 2 * size
    p, q = min(shape), max(shape)
    if label == "frugal":
        columns = shape[1] // 4
        return SINGLE * 2 * shape[0] * columns + 8 * columns
    r = min(128, p)
    moments = 2 * q * r
    return SINGLE * p * r + moments * (1 + SINGLE / QUANTUM if label == "galore, 8 bits" else SINGLE)
