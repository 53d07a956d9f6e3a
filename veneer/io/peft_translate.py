"""Files of one form that are another form's in effect, put into that form before they are read.

AdaLoRA's singular values go into its A, and its scale α/(r + 1e-5), r the rank before pruning, into α; Tucker factors
of LoHa and LoKr are multiplied into their neighbours, which gives the same matrix at the same rank; P-tuning and
CPT leave a prompt, a cartridge is a prefix that nothing projects; Bone is what MiSS was called before.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.errors import UserError
from veneer.io.files import typed
from veneer.io.peft_kinds import TRANSLATED

_SCHEDULE = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
_ENCODER = ("encoder_hidden_size", "encoder_num_layers", "encoder_dropout", "encoder_reparameterization_type")
_CPT = ("cpt_", "opt_")  # which of its tokens train, how far they may move, and how its loss weighs examples


def translated(raw: Mapping[str, Any], kind: str, path: Path) -> dict[str, Any]:
    """The content of ``adapter_config.json`` in the terms of the kind that reads it."""
    config = dict(raw) | {"peft_type": TRANSLATED.get(kind.upper(), kind.upper())}
    if kind.upper() == "ADALORA":
        return _from_adalora(config, path)
    if kind.upper() == "P_TUNING":
        return {k: v for k, v in config.items() if k not in _ENCODER}
    if kind.upper() == "CPT":
        return {k: v for k, v in config.items() if not k.startswith(_CPT)}
    if kind.upper() == "CARTRIDGE":
        return {k: v for k, v in config.items() if k != "num_frozen_tokens"}
    return config


def _from_adalora(config: dict[str, Any], path: Path) -> dict[str, Any]:
    r = typed(config, "init_r", (int,), path)
    alpha = typed(config, "lora_alpha", (float,), path)
    pruned = typed(config, "rank_pattern", (dict,), path, {})
    ranks = {_site(key): sum(bool(v) for v in kept) if isinstance(kept, list) else kept for key, kept in pruned.items()}
    config = {k: v for k, v in config.items() if k not in _SCHEDULE}
    if alpha <= 0:
        raise UserError(f"{path}: lora_alpha is {alpha}; AdaLoRA adapters are read with one above 0")
    ranks = {k: max(1, v) for k, v in ranks.items()}  # a site that was pruned away stays as one component of zeros
    own = {f"^{k}": alpha * v / (r + 1e-5) for k, v in ranks.items()}
    config |= {"r": r, "rank_pattern": {f"^{k}": v for k, v in ranks.items()}}
    return config | {"lora_alpha": alpha * r / (r + 1e-5), "alpha_pattern": own}


def _site(key: str) -> str:
    """The path of the module from AdaLoRA's name of its mask."""
    return key.removeprefix("base_model.model.").partition(".lora_E")[0]


def tensors_of(kind: str, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of the file at ``path``, whose config says ``kind``, in the terms of the kind that reads them."""
    kind = kind.upper()
    if kind == "ADALORA":
        return _plain_factors(tensors, path)
    if kind == "BONE":
        return {k.replace(".bone_block", ".miss_block"): t for k, t in tensors.items()}
    if kind == "LOHA":
        return _without_core(tensors, {"hada_t1": ("hada_w1_a", "hada_w1_b"), "hada_t2": ("hada_w2_a", "hada_w2_b")})
    if kind == "LOKR":
        return _without_core(tensors, {"lokr_t2": ("lokr_w2_a", "lokr_w2_b")})
    return dict(tensors)


def _plain_factors(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    out = dict(tensors)
    for key in [k for k in tensors if k.endswith(".lora_E")]:
        at = key.removesuffix(".lora_E")
        factors = [out.pop(f"{at}.{name}", None) for name in ("lora_A", "lora_B", "lora_E")]
        if any(t is None for t in factors):
            raise UserError(f"{path} has a lora_E for {at} without its lora_A and lora_B; the file is incomplete")
        A, B, E = factors
        if A.ndim != 2 or tuple(E.shape) != (A.shape[0], 1):
            raise UserError(f"{path}: the factors of {at} have shapes {tuple(A.shape)} and {tuple(E.shape)}; lora_A "
                            "(r, in) and lora_E (r, 1) were expected")  # fmt: skip
        if not len(A):
            A, B, E = A.new_zeros(1, A.shape[1]), B.new_zeros(len(B), 1), E.new_zeros(1, 1)
        out[f"{at}.lora_A.weight"], out[f"{at}.lora_B.weight"] = A * E, B
    return out


def _without_core(tensors: Mapping[str, Tensor], cores: Mapping[str, tuple[str, str]]) -> dict[str, Tensor]:
    """Σ_ij T_ij,kl·a_ip·b_jr as one product: the left factor aᵀ (p, i), the right one Σ_j T_ij,kl·b_jr (i, r·k·l)."""
    out = dict(tensors)
    for core, (left, right) in cores.items():
        for key in [k for k in tensors if k.endswith(f".{core}")]:
            at = key.removesuffix(core)
            if at + left in out and at + right in out:
                T, b = out.pop(key).float(), out[at + right].float()
                out[at + left] = out[at + left].T.contiguous()
                out[at + right] = torch.einsum("ij...,jr->ir...", T, b).flatten(1)
    return out
