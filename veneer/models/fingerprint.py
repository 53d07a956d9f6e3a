"""A fingerprint of a base: which weights an adapter was made on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn


def base_fingerprint(model: nn.Module, without: Iterable[str] = ()) -> str:
    """A hash of the base's tensors: names, shapes and 256 evenly spaced values of each, rounded to bf16.

    The same for one base in fp32, in bf16, and with its layers converted to another storage; adapters are left out,
    and so are the tensors named ``without``: a head made for the task is another one each time the base is loaded.
    """
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if ".veneer." not in f".{path}." and "veneer_shared" not in path:
            own = module.__dict__.get("_veneer_digests") or digests(module)
            found |= {f"{path}.{n}".lstrip("."): d for n, d in own.items()}
    for name in without:
        found.pop(name, None)
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:32]


def digests(module: nn.Module) -> dict[str, str]:
    """The digest of each parameter that the module itself holds."""
    out = {}
    for name, p in module.named_parameters(recurse=False):
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p  # sharded over processes
        flat = whole.detach().reshape(-1)
        at = torch.linspace(0, max(0, flat.numel() - 1), min(256, flat.numel()), dtype=torch.float64).long()
        values = flat[at.to(flat.device)].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()
        out[name] = hashlib.sha256(f"{tuple(p.shape)}".encode() + values).hexdigest()
    return out
