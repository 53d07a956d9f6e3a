"""How large attention scores are, and on which side of the norm threshold they lie (arXiv:2406.03136, system 15).

Hu et al., "Computational Limits of Low-Rank Adaptation (LoRA) for Transformer-Based Models": the gradient of a LoRA
update of an attention layer over L tokens can be approximated in nearly linear time while queries and keys stay below a
norm of order √log L, and under SETH in no time that is truly below L² above it. The theorem is asymptotic and names no
constants, so "above" says that no fast algorithm can promise accuracy, not that an approximation would be useless.

For each head, after rotary embedding and all that acts between W and the scores, with S = β·QKᵀ over allowed pairs:

===========  ========================================================================================
quantity     meaning
===========  ========================================================================================
M            max |S|; Γ² of the theory, and M ≤ h·Γ_Q·Γ_K
D            largest spread max S − min S of a row, all that softmax sees; ``D_median`` over the rows
Γ_Q Γ_K Γ_V  √β·max |Q|, √β·max |K|, max |V|; with Δ: of what the adapter adds to the projection's output
τ            ln L, the threshold for M
ratio        M/τ: "below" up to 0.5, "above" from 2, "transition" between (the bounds are ours)
rank_99      the fewest singular values of P = softmax(S) that hold 99 % of its energy, on at most 512 tokens
===========  ========================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, adapters
from veneer.core.context import current
from veneer.core.site import all_sites
from veneer.errors import UserError
from veneer.train.modes import evaluating

BELOW, ABOVE = 0.5, 2.0  # of M/τ
NAME = "veneer_score_norms"  # under which transformers finds the recording attention
ROWS, SVD_TOKENS, SVD_HEADS = 256, 512, 4


@dataclass
class Heads:
    """What was seen of one attention module: a value a head, the medians' rows kept apart."""

    scaling: float
    width: int
    M: Tensor
    M_rest: Tensor
    D: Tensor
    gamma_q: Tensor
    gamma_k: Tensor
    gamma_v: Tensor
    spreads: list[Tensor] = field(default_factory=list)
    entropies: list[Tensor] = field(default_factory=list)
    ranks: list[Tensor] = field(default_factory=list)

    def add(self, other: Heads) -> None:
        """Take in another sequence."""
        for name in ("M", "M_rest", "D", "gamma_q", "gamma_k", "gamma_v"):
            setattr(self, name, torch.maximum(getattr(self, name), getattr(other, name)))
        for name in ("spreads", "entropies", "ranks"):
            getattr(self, name).extend(getattr(other, name))


def side(ratio: float) -> str:
    """On which side of the threshold M/τ lies."""
    return "below" if ratio <= BELOW else "above" if ratio > ABOVE else "transition"


def taylor_degree(bound: float, accuracy: float = 0.1) -> int:
    """The smallest g with B^(g+1)/(g+1)!·e^(2B) ≤ ε: the degree at which a Taylor series of exp is that accurate."""
    log_term, g = math.log(bound) if bound > 0 else -math.inf, 0
    while log_term + 2 * bound > math.log(accuracy):
        g += 1
        log_term += math.log(bound / (g + 1))
    return g


def taylor_features(degree: int, width: int) -> int:
    """C(h + g, g): how many monomials up to degree g a head of width h has, the rank such a series gives P."""
    return math.comb(width + degree, degree)


@torch.no_grad()
def norm_report(
    model: nn.Module, ids: Tensor, adapter: Adapter | None = None, mask: Tensor | None = None, ranks: bool = True
) -> dict[str, Any]:
    """Where each attention layer lies, on ``ids (rows, L)`` with ``mask`` 1 at real tokens, adapter on and off.

    ``layers`` (a dict each: ``path``, ``block``, ``side``, ``M``, ``M_base``, ``M_rest`` without the first token,
    ``ratio``, ``ratio_median`` = D_median/2τ, ``change`` = (M − M_base)/τ, ``D``, ``D_median``, ``gamma_q`` …,
    ``base_q`` … (without the adapter) and ``delta_q`` … (what it adds, before rotary embedding), ``entropy``,
    ``rank_99`` where ``ranks`` asks for it, ``crossing`` = 2τ/M, ``degree`` and ``features`` of a Taylor series at
    ε = 0.1, and ``heads``), ``counts`` by side, ``tokens``, ``threshold``, and ``words``. Other adapters of the model
    are off.

    Raises:
        UserError: the model's attention is not reached through transformers' attention interface.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    tokens = int(mask.sum(1).max())
    if tokens < 2:
        raise UserError(f"the text has {tokens} token; the threshold ln L needs at least 2")
    with ExitStack() as stack:
        for other in adapters(model).values():
            if other is not adapter:
                stack.enter_context(other.disabled())
        stack.enter_context(evaluating(model))
        moved: dict[str, float] = {}
        with _watched(model, adapter, moved):
            tuned = _seen(model, ids, mask, ranks)
        base = tuned
        if adapter is not None:
            with adapter.disabled():
                base = _seen(model, ids, mask, ranks=False)
    layers = [_layer(path, heads, base[path], moved, math.log(tokens)) for path, heads in tuned.items()]
    counts = {name: sum(row["side"] == name for row in layers) for name in ("below", "transition", "above")}
    report = {"tokens": tokens, "threshold": math.log(tokens), "layers": layers, "counts": counts}
    return report | {"words": _words(report)}


@torch.no_grad()
def sweep(model: nn.Module, ids: Tensor, lengths: list[int]) -> list[dict[str, Any]]:
    """Medians over the layers at several lengths, as ``tokens``, ``threshold``, ``M``, ``ratio`` and the counts.

    τ grows with L, and so does M, which is a maximum over more pairs: whether a longer text is cheaper is to be seen.
    """
    found = []
    for length in lengths:
        report = norm_report(model, ids[:, :length], ranks=False)
        M = torch.tensor([row["M"] for row in report["layers"]])
        found.append(
            {"tokens": report["tokens"], "threshold": report["threshold"], "M": float(M.median())}
            | {"ratio": float(M.median()) / report["threshold"], **report["counts"]}
        )
    return found


def _layer(path: str, heads: Heads, base: Heads, moved: dict[str, float], threshold: float) -> dict[str, Any]:
    M, D_median = float(heads.M.max()), torch.cat(heads.spreads, 1).median(1).values
    degree = taylor_degree(M)
    sides = [side(float(m) / threshold) for m in heads.M]
    block = next((int(part) for part in path.split(".") if part.isdigit()), None)
    return {
        "path": path, "block": block, "side": side(M / threshold), "M": M, "M_base": float(base.M.max()),
        "M_rest": float(heads.M_rest.max()), "ratio": M / threshold, "crossing": ABOVE * threshold / max(M, 1e-30),
        "ratio_median": float(D_median.median()) / (2 * threshold),
        "change": (M - float(base.M.max())) / threshold,
        "D": float(heads.D.max()), "D_median": float(D_median.median()),
        **{f"gamma_{r}": float(getattr(heads, f"gamma_{r}").max()) for r in "qkv"},
        **{f"base_{r}": float(getattr(base, f"gamma_{r}").max()) for r in "qkv"},
        **{f"delta_{r}": moved.get(f"{path} {r}", 0.0) * (1 if r == "v" else heads.scaling**0.5) for r in "qkv"},
        "entropy": float(torch.stack(heads.entropies).mean()),
        "rank_99": float(torch.stack(heads.ranks).mean()) if heads.ranks else None,
        "width": heads.width, "degree": degree, "features": float(taylor_features(degree, heads.width)),
        "heads": {"M": heads.M.tolist(), "D": heads.D.tolist(), "D_median": D_median.tolist(), "side": sides},
    }  # fmt: skip


def _words(report: dict[str, Any]) -> str:
    layers, counts, threshold = report["layers"], report["counts"], report["threshold"]
    lowest, highest = (f(layers, key=lambda row: row["M"]) for f in (min, max))
    sides = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    words = (
        f"{sides} the threshold ln {report['tokens']} = {threshold:.2f}; the transition is at scores of "
        f"{BELOW * threshold:.1f} to {ABOVE * threshold:.1f}, and the layers have {lowest['M']:.1f} to "
        f"{highest['M']:.1f}"
    )
    if counts["above"]:
        nearest = max(row["crossing"] for row in layers if row["side"] == "above")
        words += f"; the nearest one above would enter it with {nearest:.2f} times its scores"
    return words


# -- seeing queries, keys and values -----------------------------------------------------------------------------------


def _seen(model: nn.Module, ids: Tensor, mask: Tensor, ranks: bool) -> dict[str, Heads]:
    """What every self-attention of the model had, by path, one sequence at a time."""
    found: dict[str, Heads] = {}
    paths = {module: path for path, module in model.named_modules()}
    for row, real in zip(ids, mask.bool()):

        def record(module: nn.Module, heads: Heads) -> None:
            path = paths.get(module, type(module).__name__)
            if path in found:
                found[path].add(heads)
            else:
                found[path] = heads

        with _recording(model, record, real, ranks):
            model(input_ids=row[None], attention_mask=real[None].long(), **_decoded(model, row[None]))
    if not found:
        raise UserError(
            f"{type(model).__name__} does not run its attention through transformers' attention interface, so its "
            "scores cannot be seen"
        )
    return found


def _decoded(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """What an encoder–decoder wants beside its input."""
    config = getattr(model, "config", None)
    return {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {"use_cache": False}


@contextmanager
def _recording(
    model: nn.Module, record: Callable[[nn.Module, Heads], None], real: Tensor, ranks: bool
) -> Iterator[None]:
    """The model with an attention that does the same in plain products and tells what it saw."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, **given: Any) -> Any:
        if given.get("s_aux") is not None:
            raise UserError(f"{type(module).__name__} has attention sinks of its own, which this report does not know")
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scaling = given.get("scaling")
        scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
        if given.get("position_bias") is not None:
            bias = given["position_bias"] if bias is None else bias + given["position_bias"]
        keep = real if q.shape[2] == k.shape[2] == len(real) else None
        q32, k32, v32 = (x[0].float() for x in (q, k, v))
        out, seen = _attended(q32, k32, v32, bias, scaling, given.get("softcap"), keep, ranks)
        if keep is not None:
            norms = [x[:, keep].abs().amax((1, 2)) for x in (q32 * scaling**0.5, k32 * scaling**0.5, v32)]
            record(module, Heads(scaling, q.shape[-1], *seen[:3], *norms, *seen[3:]))
        return out.to(q.dtype).transpose(0, 1)[None], None

    configs = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "to_dict")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    try:
        for config, _ in before:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


def _attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scaling: float,
    cap: float | None,
    real: Tensor | None,
    ranks: bool,
) -> tuple[Tensor, tuple[Any, ...]]:
    """softmax(S)V (heads, L, h) of one sequence, and M, M_rest, D, spreads, entropies, ranks of its ``real`` rows."""
    bias = None if bias is None else bias[0].float()
    outs, spreads, entropies, tops, rests, maps = [], [], [], [], [], []
    for start in range(0, q.shape[1], ROWS):
        rows = slice(start, start + ROWS)
        S = scaling * q[:, rows] @ k.transpose(1, 2)
        S = S if cap is None else cap * torch.tanh(S / cap)
        allowed = torch.ones_like(S, dtype=torch.bool)
        if bias is not None:
            part = bias[:, rows].expand_as(S)
            allowed = part > torch.finfo(torch.float32).min / 2
            S = S + part.masked_fill(~allowed, 0)
        P = S.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()
        outs.append(P @ v)
        own = None if real is None else real[rows]
        if own is None or not bool(own.any()):
            continue
        S, allowed, P = S[:, own], allowed[:, own], P[:, own]
        sizes = S.abs().masked_fill(~allowed, 0)
        tops.append(sizes.amax((1, 2)))
        rests.append(sizes[:, :, 1:].amax((1, 2)))
        high, low = (S.masked_fill(~allowed, sign * torch.inf) for sign in (-1, 1))
        spreads.append(high.amax(2) - low.amin(2))
        entropies.append(-torch.special.xlogy(P, P).sum(2).mean(1))
        if ranks and start < SVD_TOKENS:
            maps.append(P[:SVD_HEADS, :, :SVD_TOKENS])
    if not tops:
        return torch.cat(outs, 1), ()
    M, rest, D = (torch.stack(x).amax(0) for x in (tops, rests, [s.amax(1) for s in spreads]))
    svd = [_rank_99(torch.cat(maps, 1))] if maps else []
    return torch.cat(outs, 1), (M, rest, D, [torch.cat(spreads, 1)], entropies, svd)


def _rank_99(P: Tensor) -> Tensor:
    """The mean over heads of the fewest components of P (heads, rows, columns) with 99 % of Σσ²."""
    energy = torch.linalg.svdvals(P).square().cumsum(-1)
    return (energy < 0.99 * energy[:, -1:]).sum(1).add(1).float().mean()


@contextmanager
def _watched(model: nn.Module, adapter: Adapter | None, moved: dict[str, float]) -> Iterator[None]:
    """Fill ``moved`` with max |change of the output| of each adapted q, k and v, as "module role", on one input."""
    if adapter is None:
        yield
        return
    adapted = {path.removesuffix(".weight").removesuffix(".bias") for path in adapter.every()}
    sites = [s for s in all_sites(model) if s.role in "qkv" and {s.path, s.module_path} & adapted]
    busy: list[bool] = []

    def watch(site: Any) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            if busy:
                return
            busy.append(True)
            try:
                with adapter.disabled():
                    change = output - module(*args, **kwargs)
            finally:
                busy.clear()
            change = change if site.rows is None else change[..., site.rows]
            ctx = current()
            if ctx is not None and ctx.mask is not None and ctx.mask.shape == change.shape[:-1]:
                change = change[ctx.mask.bool()]
            key = f"{_attention(model, site.module_path)} {site.role}"
            moved[key] = max(moved.get(key, 0.0), float(change.abs().max()))

        return hook

    handles = [s.module.register_forward_hook(watch(s), with_kwargs=True) for s in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attention(model: nn.Module, path: str) -> str:
    """The attention module that a projection belongs to: what directly holds it."""
    return path.rpartition(".")[0]
