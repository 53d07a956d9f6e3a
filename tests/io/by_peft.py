"""Adapters made by PEFT on the tiny models, every tensor of theirs moved by random numbers."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from models import make

# What PEFT says of a base or a choice that is as meant here.
KNOWN = ".*fan_in_fan_out|.*merging LoRA weights won't be possible|.*(not save|not to save|to not load)|.*cayley"
KNOWN += "|Setting boft_n_butterfly_factor|Failed to load the CUDA extension|Unsupported layer type"
KNOWN += "|.*rank_pattern keys did not match|Invalid `oft_block_size`"


def saved(folder: Path, kind: str, *, initial: bool | str = False, form: str = "Lora", **config):
    """Make and save an adapter; returns (directory, PEFT's output on the case's batch, the PEFT model).

    ``form`` is PEFT's name of the method. ``initial`` saves the start as well, in ``initial`` beside it; ``"convert"``
    subtracts it from what is saved.
    """
    import peft

    case = make(kind)
    if config.get("init_lora_weights") == "corda":
        _eigens(case.model, config["r"])
    if config.get("init_lora_weights") == "lora_ga":
        config["lora_ga_config"] = peft.LoraGAConfig()
        _gradients(case.model)
    options = {"path_initial_model_for_weight_conversion": str(folder / "initial")} if initial == "convert" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(case.model, getattr(peft, f"{form}Config")(**config))
        if initial:
            at = model.peft_config["default"]
            start, at.init_lora_weights = at.init_lora_weights, True
            model.save_pretrained(str(folder / "initial"))
            at.init_lora_weights = start
        shake(model, 1.0 if kind == "bert" else 0.3)
        output = run(model, case.batch)
        model.save_pretrained(str(folder / "adapter"), **options)
    return folder / "adapter", output, model


def loaded(directory: Path, kind: str):
    """The tiny model with the adapter in ``directory`` on it, by PEFT; its warnings are errors."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=KNOWN)
        return PeftModel.from_pretrained(make(kind).model, str(directory))


def shake(model, size: float = 0.3) -> None:
    """Move every trained tensor by random numbers."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=draw) * size)


def run(model, batch):
    """The logits, without gradient."""
    model.eval()
    with torch.no_grad():
        out = model(**batch)
    return out if isinstance(out, torch.Tensor) else out.logits


def _eigens(model, rank: int) -> None:
    """What PEFT's preprocess_corda leaves on the layers, here of a covariance that is random, not measured."""
    draw = torch.Generator().manual_seed(4)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            root = torch.randn(module.in_features, module.in_features, generator=draw)
            C = root @ root.T
            U, S, Vh = torch.linalg.svd(module.weight.detach() @ C, full_matrices=False)
            V = torch.linalg.solve(C, Vh.T)
            module.eigens = SimpleNamespace(U_WC=U[:, :rank], S_WC=S[:rank].clone(), V_WC=V[:, :rank])


def _gradients(model) -> None:
    """What PEFT's preprocess_loraga leaves on the layers, here a gradient that is random, not measured."""
    draw = torch.Generator().manual_seed(4)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module._peft_loraga_grad = torch.randn(module.weight.shape, generator=draw)
