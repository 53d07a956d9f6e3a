"""Thin copies of a trunk's blocks: of the same class, every width divided, started by structural pruning."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.site import Site, all_sites
from veneer.errors import UserError
from veneer.models import architecture

# Sizes of a config that shrink; the numbers of heads stay.
WIDTHS = (
    *("hidden_size", "n_embd", "d_model", "dim", "head_dim", "d_kv"),
    *("intermediate_size", "n_inner", "d_ff", "ffn_dim", "hidden_dim", "ffn_hidden_size"),
)

Importance = Callable[[Site], Tensor]  # of each entry of a layer's dense weight (out, in), at least 0


def keep_top(score: Tensor, reduction: int) -> Tensor:
    """The indices, ascending, of the n − round((1 − 1/r)·n) highest of n scores; of equals the first."""
    n = len(score)
    count = n - round((1 - 1 / reduction) * n)
    return score.argsort(descending=True, stable=True)[:count].sort().values


def turns(trunk: nn.Module) -> bool:
    """Whether the blocks are given the angles by which positions turn pairs of each head's dimensions."""
    block = architecture.blocks(trunk)[0][1]
    return "position_embeddings" in inspect.signature(_plain_class(block).forward).parameters


def thin_config(trunk: nn.Module, reduction: int) -> Any:
    """The trunk's config with its widths divided; raises UserError where one cannot be."""
    config, r = architecture.text_config(trunk), reduction
    sizes = {name: value for name in WIDTHS if type(value := getattr(config, name, None)) is int}
    for name, value in {**sizes, "head_dim": architecture.head_dim(trunk)}.items():
        pairs = name == "head_dim" and turns(trunk)
        if value % (2 * r if pairs else r):
            raise UserError(
                f"{name}={value} of this model cannot be divided by reduction={r}"
                f"{' into pairs of dimensions, which its positions turn' if pairs else ''}; take a smaller reduction"
            )
    thin = deepcopy(config)
    for name, value in sizes.items():
        setattr(thin, name, value // r)
    return thin


def thin_block(block: nn.Module, config: Any, index: int, generator: torch.Generator) -> nn.Module:
    """A block of the same class in fp32: matrices N(0, σ²) with the config's σ, biases 0, norms 1.

    It computes in the type of its input, its tensors cast.
    """
    cls = _plain_class(block)
    numbered = {"layer_idx": index} if "layer_idx" in inspect.signature(cls).parameters else {}
    with torch.random.fork_rng(devices=[]):
        thin = cls(config, **numbered).float()
    for module in thin.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.ndim > 1:
                nn.init.normal_(p, 0.0, getattr(config, "initializer_range", 0.02), generator=generator)
            elif name == "bias":
                nn.init.zeros_(p)
    thin.__class__ = _casting(cls)
    return thin


@contextmanager
def cast_to(module: nn.Module, x: Tensor) -> Iterator[None]:
    """Within it a module's tensors are cast to the type of ``x``; gradients reach the tensors themselves."""
    if torch.is_autocast_enabled(x.device.type):
        yield
        return
    own = [(m, n, p) for m in module.modules() for n, p in m._parameters.items() if p is not None]
    for m, n, p in own:
        m._parameters[n] = p.to(x.dtype)
    try:
        yield
    finally:
        for m, n, p in own:
            m._parameters[n] = p


class _Casting:
    """Mixed into a thin block's class, so that checkpointing, which wraps forward, casts again when it recomputes."""

    _veneer_base: type[nn.Module]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        with cast_to(self, hidden_states):
            return super().forward(hidden_states, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _rebuilt, (self._veneer_base,), self.__dict__


@cache
def _casting(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (_Casting, cls), {"_veneer_base": cls, "__module__": __name__})


def _rebuilt(cls: type[nn.Module]) -> nn.Module:
    new = _casting(cls)
    return new.__new__(new)


def thin_norm(norm: nn.Module, size: int) -> nn.Module:
    """A norm of the same class over ``size`` entries, at its usual start."""
    return _plain_class(norm)(size, eps=getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)))


def thin_count(module: nn.Module, reduction: int) -> int:
    """The number of entries of a module's tensors when every dimension is divided."""
    total, r = 0, reduction
    for _, m in architecture.named_modules(module):
        shape = architecture.features(m)  # of a layer stored quantised too
        if shape is None:
            total += sum(p.numel() // r**p.ndim for p in m.parameters(recurse=False))
        else:
            total += shape[0] * shape[1] // r**2 + (0 if m.bias is None else shape[0] // r)
    return total


def last_norm(trunk: nn.Module) -> nn.Module | None:
    """The norm behind the blocks; None where each block ends with one (BERT)."""
    inside = tuple(f"{path}." for path, _ in architecture.blocks(trunk))
    found = [m for path, m in _norms(trunk) if not path.startswith(inside) and "embed" not in path]
    return found[-1] if found else None


@torch.no_grad()
def prune(
    trunk: nn.Module, side: dict[int, nn.Module], norm: nn.Module | None, reduction: int, importance: Importance
) -> list[Tensor]:
    """Start thin blocks, by the index of the block that each is a copy of, and a thin last norm from the trunk.

    Through the layers as they run, the survivors of the layer before select columns, and the heaviest 1/r of the rows
    by Σ importance survive: of q, k and v together, and of gate and up together, by the product of their sums. Those of
    q, k and v are chosen within each head, with all queries of a group alike; where positions turn the heads, in pairs
    and in all heads alike. Nothing keeps a residual stream's dimensions together.

    Returns for each block the surviving dimensions of its first head. Raises UserError for a block whose attention and
    MLP do not show as q, k, v, o, (gate,) up, down.
    """
    sites, blocks, width = all_sites(trunk), architecture.blocks(trunk), architecture.hidden_size(trunk)
    inside = tuple(f"{path}." for path, _ in blocks)
    embedding = next((s for s in sites if not s.path.startswith(inside) and s.out_features == width), None)
    keep = keep_top(torch.zeros(width) if embedding is None else importance(embedding).sum(1), reduction)
    heads = []
    for i, thin in side.items():
        path, block = blocks[i]
        inner = [s for s in sites if s.module_path.startswith(f"{path}.")]
        walk = _Walk(trunk, block, path, thin, inner, reduction, importance)
        head, keep = walk.run(keep)
        heads.append(head)
    last = last_norm(trunk)
    if last is not None and norm is not None:
        _copy_entries(norm, last, keep)
    return heads


class _Walk:
    """Structural pruning through one block."""

    def __init__(
        self,
        trunk: nn.Module,
        block: nn.Module,
        path: str,
        thin: nn.Module,
        sites: list[Site],
        reduction: int,
        importance: Importance,
    ) -> None:
        self.trunk, self.block, self.path, self.thin, self.r = trunk, block, path, thin, reduction
        self.at = {s.role: s for s in sites}
        known = {*"qkvo", "gate", "up", "down"}
        if len(self.at) != len(sites) or not known - {"gate"} <= self.at.keys() <= known:
            raise UserError(
                f"the layers of {type(block).__name__} do not show as q, k, v, o, up and down, by which it would be "
                "pruned: start at random"
            )
        self.weights = {role: importance(site) for role, site in self.at.items()}

    def run(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """From the surviving inputs to the surviving dimensions of the first head, and of the output."""
        head, queries, values = self.heads(keep)
        for role in "qkv":
            self.put(role, queries if role == "q" else values, keep)
        middle = self.put("o", keep_top(self.mass("o", queries), self.r), queries)
        up = [role for role in ("gate", "up") if role in self.at]
        wide = keep_top(torch.stack([self.mass(role, middle) for role in up]).prod(0), self.r)
        for role in up:
            self.put(role, wide, middle)
        out = self.put("down", keep_top(self.mass("down", wide), self.r), wide)
        self.norms(keep, middle, out, head)
        return head, out

    def mass(self, role: str, columns: Tensor) -> Tensor:
        """The importance of each row (out,) over the columns that are left."""
        return self.weights[role][:, columns].sum(1)

    def heads(self, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The survivors of q, k and v: dimensions of the first head, rows of q, rows of k and v."""
        D = architecture.head_dim(self.trunk)
        groups, heads = self.at["k"].out_features // D, self.at["q"].out_features // D
        q, k, v = (self.mass(role, keep).view(groups, -1, D).sum(1) for role in "qkv")
        score = q * k * v
        if turns(self.trunk):
            pairs = keep_top(score.sum(0).view(2, D // 2).sum(0), self.r)
            chosen = torch.cat([pairs, pairs + D // 2]).repeat(groups, 1)
        else:
            chosen = torch.stack([keep_top(s, self.r) for s in score])
        first, last = (torch.arange(n, device=chosen.device)[:, None] * D for n in (heads, groups))
        queries = first + chosen.repeat_interleave(heads // groups, 0)
        return chosen[0], queries.flatten(), (last + chosen).flatten()

    def put(self, role: str, rows: Tensor, columns: Tensor) -> Tensor:
        """Copy what survives of a layer into the thin one; returns the rows."""
        site = self.at[role]
        cut = None if site.rows is None else slice(site.rows.start // self.r, site.rows.stop // self.r)
        module = self.thin.get_submodule(site.module_path.removeprefix(f"{self.path}."))
        thin = replace(site, module=module, rows=cut)
        thin.write(site.weight()[rows][:, columns])
        if site.bias() is not None:
            thin.bias().copy_(site.bias()[rows])
        return rows

    def norms(self, keep: Tensor, middle: Tensor, out: Tensor, head: Tensor) -> None:
        """Norms stand before attention and MLP, or behind them where the trunk has no last norm, or both."""
        norms, width = _norms(self.block), architecture.hidden_size(self.trunk)
        whole = [m for _, m in norms if len(m.weight) == width]
        order = {2: (keep, middle) if last_norm(self.trunk) is not None else (middle, out)}
        order[4] = (keep, middle, middle, out)
        survivors = dict(zip(whole, order.get(len(whole), (keep,) * len(whole))))
        for path, m in norms:
            _copy_entries(self.thin.get_submodule(path), m, survivors.get(m, head))


def _plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without what an adapter has mixed in."""
    cls = type(module)
    while hasattr(cls, "_veneer_base"):
        cls = cls._veneer_base
    return cls


def _norms(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(p, m) for p, m in architecture.named_modules(module) if architecture.role(p, m, module) == "norm"]


def _copy_entries(thin: nn.Module, norm: nn.Module, keep: Tensor) -> None:
    for name, p in thin.named_parameters():
        p.copy_(getattr(norm, name)[keep])
