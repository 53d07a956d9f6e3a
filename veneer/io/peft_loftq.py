"""LoftQ between PEFT and here: which base the factors are of, and when each side derives the same one again.

PEFT stores the adapted layers as nf4 in blocks of 64 without double quantisation, from the dense weights and, past one
iteration, from the rank; it does so at every load, on CUDA. What it can derive is written with the start's name.
After one iteration the base is the plain nf4 one, so that any other such adapter is plain LoRA beside the base that
bitsandbytes stores, which is how PEFT's own ``replace_lora_weights_loftq`` leaves it.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from veneer.core.adapter import Adapter
from veneer.core.build import all_fields
from veneer.core.site import Site, find_sites, stored
from veneer.errors import UserError
from veneer.io.files import typed
from veneer.io.peft_config import Config

NAME = "loftq"


def recipe(config: Config, sites: dict[str, Site], parts: dict[str, list[Site]], model: nn.Module) -> str:
    """What joins the form in a recipe that makes PEFT's base again; nothing where the layers are stored already."""
    if config.start != NAME or all(stored(s.module) is not None for s in sites.values()):
        return ""
    said = typed(config.raw, "loftq_config", (dict,), config.path)
    bits, rounds = (typed(said, f"loftq_{n}", (int,), config.path, d) for n, d in (("bits", 4), ("iter", 1)))
    if bits != 4:
        raise UserError(f"{config.path}: LoftQ in {bits} bits is not read; 4 were expected")
    linear = {s.module_path for s in find_sites(model, "linear")}
    odd = next((p for p, s in sites.items() if p not in linear or s.transposed or stored(s.module)), None)
    if odd is not None:
        raise UserError(
            f"{config.path}: the adapter was started by loftq, and {odd} cannot be stored again as PEFT stored it: "
            "load it on a base in 4 bits, or, if this model holds PEFT's quantised weights, set init_lora_weights to "
            "true there"
        )
    if rounds > 1:
        _check_rounds(rounds, [s for group in parts.values() for s in group])
    only = "" if set(sites) == linear else f", only={tuple(sites)!r}"
    return f"+nf4(double_quant=False{only})+loftq(iterations={rounds}, exact=True)"


def fields(adapter: Adapter) -> dict[str, Any]:
    """The fields of ``adapter_config.json`` that have PEFT derive the base; empty for other starts.

    Raises UserError for a base that nobody can derive.
    """
    start = next((p for p in adapter.recipe.on("init") if p.method.name == NAME), None)
    base = next(iter(adapter.recipe.on("base")), None)
    if start is None or base is None:
        return {}
    rounds, storage = all_fields(start)["iterations"], all_fields(base)
    deltas = [d for d in adapter.deltas.values() if d.site.kind == "linear"]
    held = {s.module_path for s in find_sites(adapter.model, "linear") if stored(s.module)}
    plain = base.method.name == "nf4" and storage["block_size"] == 64 and not storage["double_quant"]
    whole = held == {d.site.module_path for d in deltas} and not any(
        getattr(d.site.module, "born_transposed", False) for d in deltas
    )
    if plain and whole and (rounds == 1 or all_fields(start)["exact"]):
        if rounds > 1:
            _check_rounds(rounds, [d.site for d in deltas])
            _check_ranks(adapter)
        return {"init_lora_weights": NAME, "loftq_config": {"loftq_bits": 4, "loftq_iter": rounds}}
    if rounds > 1:
        raise UserError(
            f"PEFT cannot derive the base that loftq(iterations={rounds}) stored here: it takes whole layers, all that "
            "are stored, with nf4(double_quant=False) and loftq(exact=True); train with these, or export with "
            'format="merged"'
        )
    warnings.warn(
        f"the adapter is beside the base as {base} stores it: give PEFT that base, not the dense one", stacklevel=2
    )
    return {}


def _check_rounds(rounds: int, sites: list[Site]) -> None:
    """Past one iteration the base depends on what was decomposed, and in which precision."""
    part = next((s for s in sites if s.rows is not None), None)
    if part is not None:
        raise UserError(f"PEFT's LoftQ decomposes {part.module_path} as a whole, past one iteration to another base; "
                        f"loftq_iter={rounds} goes neither way there")  # fmt: skip
    low = next((s for s in sites if s.weight().dtype != torch.float32), None)
    if low is not None:
        raise UserError(f"{rounds} iterations of LoftQ give the same base in fp32 alone, and {low.path} is in "
                        f"{low.weight().dtype}; load the model in float32")  # fmt: skip


def _check_ranks(adapter: Adapter) -> None:
    begun = all_fields(adapter.recipe.part("delta"))
    for path, delta in adapter.deltas.items():
        rank = (begun | (adapter.plan.get(path) or {}))["rank"]
        if delta.rank != rank or delta.A.shape[0] != rank:
            raise UserError(f"{path} began with rank {rank}, of which its stored base is, and has another now, from "
                            "which PEFT would derive another base")  # fmt: skip
