"""The forward pass of one step: blocks of the Llama and GPT-2 kinds over a batch of single tokens and prompt parts.

All tokens of a step are the rows of one matrix. Layers that share an input are one product; keys and values are written
to the pool and read from its pages; `Plan` adds what the adapters change. The model's own tensors are views into the
joined ones, or stay as they are beside packed ones, so that adapters of every form can still be attached to it and
measured against it; what of them is mapped from a file leaves memory until then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.site import stored
from veneer.errors import UserError
from veneer.models import architecture
from veneer.serve.cache import Batch
from veneer.serve.layout import Groups
from veneer.serve.mapped import give_back, ranges, within
from veneer.serve.pool import PagePool
from veneer.serve.product import Plan
from veneer.serve.sizes import TILE, as_they_are, filled
from veneer.train.modes import trim

LLAMA = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
GPT2 = ("gpt2",)


class Inner(NamedTuple):
    """Where a layer of the model lies: block, group, first and last row of the group's output."""

    layer: int
    group: str
    start: int
    stop: int


@dataclass
class Linear:
    """Layers as one: ``weights`` (rows, in) one under the other, and bias (out,) or None.

    With ``pack`` the product reads a copy laid out as the CPU's bf16 product wants it, and the weights stay where they
    are; without it they must be one.
    """

    weights: tuple[Tensor, ...]
    bias: Tensor | None
    pack: bool = False

    def __post_init__(self) -> None:
        self.packed: Tensor | None = None
        if self.pack:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.rows(0, self.shape[0]).contiguous(), TILE)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return sum(w.shape[0] for w in self.weights), self.weights[0].shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the joined weight; a view where they are one layer's."""
        found, at = [], 0
        for W in self.weights:
            if at < stop and start < at + W.shape[0]:
                found.append(W[max(0, start - at) : stop - at])
            at += W.shape[0]
        return found[0] if len(found) == 1 else torch.cat(found)

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return F.linear(x, self.weights[0], self.bias)


@dataclass
class Block:
    """One decoder block: its joined layers by group and its norms."""

    linears: dict[str, Linear]
    norms: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
    scale: float
    between: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None  # norms of q and k


class Trunk:
    """A model made ready to serve.

    Raises UserError for an architecture other than the two kinds, or one with a sliding window, a rotary embedding that
    depends on the length, or quantised layers.
    """

    def __init__(self, model: nn.Module, pack: bool | None = None) -> None:
        config = architecture.text_config(model)
        self.model, self.config, self.kind = model, config, getattr(config, "model_type", None)
        if self.kind not in LLAMA + GPT2:
            raise UserError(
                f"a {self.kind or type(model).__name__} model cannot be served yet; "
                f"these can: {', '.join(LLAMA + GPT2)}"
            )
        self.heads, self.kv_heads = architecture.heads(model, "q"), architecture.heads(model, "k")
        self.head_dim = architecture.head_dim(model)
        self.width = architecture.hidden_size(model)
        self.vocabulary = config.vocab_size
        self.cell = self.kv_heads * self.head_dim
        table = architecture.embedding(model)
        self.embed = table.weight
        self.dtype, self.device = self.embed.dtype, self.embed.device
        self.places: dict[str, Inner] = {}
        self.packs = self._packs() if pack is None else pack
        self.filled = filled if self.packs else as_they_are
        base = architecture.trunk(model)
        self.blocks = _gpt2(self, base) if self.kind in GPT2 else _llama(self, base)
        head = architecture.head(model)
        self.head = Linear((head.weight.detach(),), head.bias, self.packs)
        self.longest = config.max_position_embeddings
        self._positions(base)
        outs = [i.stop - i.start for i in self.places.values() if i.layer == 0]
        sizes = {g: x.shape[::-1] for g, x in self.blocks[0].linears.items()}
        bounds = [i.start for i in self.places.values()] + [self.cell]
        self.groups = Groups(sizes, reduce(math.gcd, outs + bounds))
        self.give_back()

    def give_back(self) -> None:
        """Take out of memory what was only read to be copied: mapped from the model's file, or freed since."""
        give_back(self.model.parameters())
        trim()

    @property
    def weight_bytes(self) -> int:
        """Bytes of the base in memory: what every step reads, and what lies beside it without being mapped."""
        joined = (*(x for b in self.blocks for x in b.linears.values()), self.head)
        copied = {W.data_ptr() for x in joined if x.packed is not None for W in x.weights} - {self.embed.data_ptr()}
        found = {p.data_ptr(): p for p in self.model.parameters()}
        files = ranges(found.values())
        own = [p for at, p in found.items() if at not in copied or not within(p, files)]
        return sum(map(_bytes, own)) + sum(_bytes(W) for x in joined if x.packed is not None for W in x.weights)

    def pool(self, pages: int, tokens: int = 16) -> PagePool:
        """A pool for this model."""
        return PagePool(len(self.blocks), pages, self.cell, tokens, self.dtype, self.device)

    def page_bytes(self, tokens: int = 16) -> int:
        """Bytes of one page of such a pool."""
        return 2 * tokens * self.cell * self.embed.element_size() * len(self.blocks)

    @torch.inference_mode()
    def logits(self, batch: Batch, plan: Plan, pool: PagePool) -> Tensor:
        """The logits (rows asked for, vocabulary) of a step; its keys and values are in the pool afterwards."""
        x = F.embedding(batch.tokens, self.embed)
        if self.kind in GPT2:
            x = x + F.embedding(batch.positions, self.position_table)
            turn = None
        else:
            turn = self._turn(batch.positions)
        cells, blocks = pool.rows(self.cell), pool.blocks()
        for number, block in enumerate(self.blocks):
            lin = block.linears

            def run(group: str, x: Tensor, number: int = number, lin: dict[str, Linear] = lin) -> Tensor:
                y = lin[group](x)
                plan.add(number, group, x, y)
                return y

            qkv = run("qkv", block.norms[0](x))
            heads = self._turned(qkv, turn, block)
            cells[number].index_copy_(0, batch.writes, heads[: batch.count, self.heads :].reshape(-1, self.cell))
            attended = batch.attend(heads, blocks[number], self.heads, self.kv_heads, block.scale)
            x = x + run("o", attended)
            n = block.norms[1](x)
            if "gate_up" in lin:
                gate, up = run("gate_up", n).chunk(2, 1)
                x = x + run("down", self.act(gate).mul_(up))
            else:
                x = x + run("down", self.act(run("up", n)))
        x = x if batch.asked is None else x.index_select(0, batch.asked)
        return self.head(self.last_norm(x))[: batch.answers]

    def _turned(self, qkv: Tensor, turn: tuple[Tensor, Tensor] | None, block: Block) -> Tensor:
        """q, k and v by head (T, heads + 2 · kv_heads, head_dim), q and k rotated."""
        heads = qkv.view(qkv.shape[0], -1, self.head_dim)
        if block.between is not None:
            q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), 1)
            heads = torch.cat((block.between[0](q), block.between[1](k), v), 1)
        if turn is None:
            return heads
        return (heads * turn[0]).addcmul_(heads.roll(self.head_dim // 2, -1), turn[1])

    def _turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin (T, heads, head_dim) for all heads of q, k and v, where v stays as it is."""
        turned, shape = self.heads + self.kv_heads, (len(positions), self.heads + 2 * self.kv_heads, self.head_dim)
        cos, sin = self.cos.new_ones(shape), self.sin.new_zeros(shape)
        cos[:, :turned], sin[:, :turned] = self.cos.index_select(0, positions), self.sin.index_select(0, positions)
        return cos, sin

    def _positions(self, base: nn.Module) -> None:
        if self.kind in GPT2:
            self.position_table = base.wpe.weight
            return
        rope = self.config.rope_parameters
        kind = (rope or {}).get("rope_type", "default")
        if kind not in ("default", "linear", "llama3", "yarn"):
            raise UserError(f"rotary embeddings of the kind {kind!r} change with the length and cannot be served yet")
        with torch.no_grad():
            at = torch.arange(self.longest, device=self.device)[None]
            self.cos, sin = (
                t[0][:, None] for t in base.rotary_emb(torch.empty(0, dtype=self.dtype, device=self.device), at)
            )
        half = self.head_dim // 2
        self.sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)

    def _packs(self) -> bool:
        """Whether the CPU library's own weight layout is there and is of use."""
        return (
            self.device.type == "cpu"
            and self.dtype == torch.bfloat16
            and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        )


def _llama(t: Trunk, base: nn.Module) -> list[Block]:
    if getattr(t.config, "sliding_window", None) and getattr(t.config, "use_sliding_window", True):
        raise UserError("a model with a sliding attention window cannot be served yet")
    t.last_norm, t.act = _norm(base.norm), _activation(t.config.hidden_act)
    path = next(n for n, m in t.model.named_modules() if m is base)
    found = []
    for number, block in enumerate(base.layers):
        own = f"{path}.layers.{number}" if path else f"layers.{number}"
        attention, mlp = block.self_attn, block.mlp
        linears = {
            group: t_joined(t, number, group, {f"{own}.{name}": x for name, x in members.items()})
            for group, members in {
                "qkv": {f"self_attn.{n}": getattr(attention, n) for n in ("q_proj", "k_proj", "v_proj")},
                "o": {"self_attn.o_proj": attention.o_proj},
                "gate_up": {"mlp.gate_proj": mlp.gate_proj, "mlp.up_proj": mlp.up_proj},
                "down": {"mlp.down_proj": mlp.down_proj},
            }.items()
        }
        between = (_norm(attention.q_norm), _norm(attention.k_norm)) if hasattr(attention, "q_norm") else None
        norms = _norm(block.input_layernorm), _norm(block.post_attention_layernorm)
        found.append(Block(linears, norms, attention.scaling, between))
    return found


def _gpt2(t: Trunk, base: nn.Module) -> list[Block]:
    t.last_norm, t.act = _norm(base.ln_f), _activation(t.config.activation_function)
    path = next(n for n, m in t.model.named_modules() if m is base)
    found = []
    for number, block in enumerate(base.h):
        own = f"{path}.h.{number}" if path else f"h.{number}"
        members = {
            "qkv": ("attn.c_attn", block.attn.c_attn),
            "o": ("attn.c_proj", block.attn.c_proj),
            "up": ("mlp.c_fc", block.mlp.c_fc),
            "down": ("mlp.c_proj", block.mlp.c_proj),
        }
        linears = {g: t_joined(t, number, g, {f"{own}.{name}": x}) for g, (name, x) in members.items()}
        size = t.heads * t.head_dim
        for at, role in enumerate("qkv"):
            place = Inner(number, "qkv", at * size, (at + 1) * size)
            t.places[f"{own}.attn.c_attn[{role}]"] = place
        found.append(Block(linears, (_norm(block.ln_1), _norm(block.ln_2)), block.attn.scaling))
    return found


@torch.no_grad()
def t_joined(t: Trunk, number: int, group: str, members: dict[str, nn.Module]) -> Linear:
    """The layers as one; where nothing is packed theirs become views of its weight. A Conv1D's is transposed."""
    weights, biases, at = [], [], 0
    for path, module in members.items():
        if stored(module) is not None:
            raise UserError(f"{path} is stored quantised, which cannot be served yet; load the model unquantised")
        W = module.weight.T if hasattr(module, "nf") else module.weight
        t.places[path] = Inner(number, group, at, at + W.shape[0])
        at += W.shape[0]
        weights.append(W.detach())
        biases.append(module.bias)
    every = [W.new_zeros(W.shape[0]) if b is None else b.detach() for W, b in zip(weights, biases)]
    bias = None if all(b is None for b in biases) else torch.cat(every)
    if t.packs:
        return Linear(tuple(weights), bias, True)
    whole = weights[0].contiguous() if len(weights) == 1 else torch.cat(weights)
    for module, W in zip(members.values(), whole.split([w.shape[0] for w in weights])):
        module.weight.data = W.T if hasattr(module, "nf") else W
    return Linear((whole,), bias)


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor]:
    weight, bias = module.weight.detach(), getattr(module, "bias", None)
    if isinstance(module, nn.LayerNorm):
        return lambda x: F.layer_norm(x, weight.shape, weight, bias, module.eps)
    eps = module.variance_epsilon

    def rms(x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps)) * weight
        return F.rms_norm(x, weight.shape, weight, eps)

    return rms


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    from transformers.activations import ACT2FN

    return F.silu if name in ("silu", "swish") else ACT2FN[name]


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()
