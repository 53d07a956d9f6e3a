"""Starts that move capacity out of the base, as PEFT derives them again when it loads an adapter.

A directory started by PiSSA or OLoRA holds the trained factors and the name of the start; the base that they were
trained on is W − s·B₀A₀, with the start (A₀, B₀) a function of W. CorDA and LoRA-GA start from data, so that their
start must be given: the directory that was saved before training. LoftQ trains beside a quantised base, which differs
from W by more than its start, see ``peft_loftq``.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from veneer.core.site import Site
from veneer.errors import UserError
from veneer.io.files import read_tensors
from veneer.io.peft_config import CONFIG, LOST_STARTS, PLAIN_STARTS, TENSORS, Config, read_config
from veneer.io.peft_loftq import NAME as LOFTQ
from veneer.io.peft_tensors import check_layer, sort, to_dense

Start = tuple[Tensor, Tensor]


def starts(config: Config, sites: dict[str, Site], model: nn.Module, initial: Path | None) -> dict[str, Start]:
    """(A₀, B₀) of each module by path, in the dense view: s·B₀A₀ was moved. Empty when the start left the base alone.

    ``initial`` is the directory of the adapter before training, which stands above what can be derived.
    Raises UserError when the start is lost.
    """
    if config.start == LOFTQ:
        return {}
    if initial is not None:
        return _given(config, sites, model, initial)
    if config.raw.get("kasa_config") is not None:
        return {path: kasa(site, config.rank(path), config.scale(path)) for path, site in sites.items()}
    if config.start in (*PLAIN_STARTS, "none"):
        return {}
    if config.start in LOST_STARTS:
        raise UserError(
            f"{config.path}: the adapter was started by {config.start}, which moved part of the base into its factors "
            "and cannot be derived from the base again; give initial=<the directory saved before training>, or save it "
            "in PEFT with path_initial_model_for_weight_conversion"
        )
    if "_niter_" in config.start:
        warnings.warn(
            f"{config.path}: {config.start} starts from a random approximation of the SVD that nothing records; the "
            "exact SVD stands in for it here (PEFT draws a new one at every load): give initial=<the directory saved "
            "before training> for the start itself",
            stacklevel=2,
        )
    derive = olora if config.start == "olora" else pissa
    return {path: derive(site, config.rank(path), config.scale(path)) for path, site in sites.items()}


def _given(config: Config, sites: dict[str, Site], model: nn.Module, initial: Path) -> dict[str, Start]:
    first = read_config(initial / CONFIG)
    names = ("lora_A", "lora_B")
    content = sort(read_tensors(initial / TENSORS), first.map.keys.values(), model, initial / TENSORS)
    missing = [p for p in sites if any(n not in content.sites.get(p, {}) for n in names)]
    if missing:
        raise UserError(f"{initial / TENSORS} has no start for {missing[0]}, which {config.path.parent} adapts")
    out = {}
    for path, site in sites.items():
        if first.scale(path) != config.scale(path):
            raise UserError(
                f"{initial / CONFIG} gives {path} the scale {first.scale(path):g} and {config.path} gives it "
                f"{config.scale(path):g}: they are not the start and the end of one run"
            )
        own = content.sites[path]
        out[path] = tuple(to_dense(site, n, own[n], first.rank(path), initial / TENSORS) for n in names)
    return out


@torch.no_grad()
def pissa(site: Site, rank: int, scale: float) -> Start:
    """The leading singular triplets of W, their values over ``scale`` shared evenly: s·B₀A₀ is W's best rank-r part."""
    _linear(site, "pissa")
    U, S, Vh = torch.linalg.svd(site.weight().float(), full_matrices=False)
    root = (S[:rank] / scale).sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


@torch.no_grad()
def kasa(site: Site, rank: int, scale: float) -> Start:
    """The ``rank`` smallest singular triplets of W, which KaSA drops whatever its scale."""
    _linear(site, "kasa")
    U, S, Vh = torch.linalg.svd(site.weight().float(), full_matrices=False)
    if rank >= len(S):
        raise UserError(f"KaSA of rank {rank} would drop all {len(S)} singular directions of {site.path}")
    return Vh[-rank:], U[:, -rank:] * (S[-rank:] / scale)


@torch.no_grad()
def olora(site: Site, rank: int, scale: float) -> Start:
    """The first columns and rows of a QR of the weight as the layer stores it, scale left out.

    PEFT takes a Conv1D's in × out weight as it is, so that its start comes out transposed.
    """
    _linear(site, "olora")
    W = site.weight().float()
    Q, R = torch.linalg.qr(W.T if site.transposed else W)
    Q, R = Q[:, :rank], R[:rank]
    return (Q.T, R.T) if site.transposed else (R, Q)


def _linear(site: Site, start: str) -> None:
    check_layer(site)
    if site.kind != "linear":
        raise UserError(f"init_lora_weights={start!r} is for linear layers, and {site.path} is {site.kind}")
