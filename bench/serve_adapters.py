"""The adapters that the serving benches ask for, and their prompts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MODEL, RANK, SITES = "smollm2-135m", 8, ("q_proj", "k_proj", "v_proj", "o_proj")
PROMPT, OUTPUT, DISTINCT = 32, 32, 64


def make(folder: Path, count: int) -> None:
    """PEFT folders ``a0`` …, hard links to ``DISTINCT`` different ones; those that are there stay."""
    import torch

    if (folder / f"a{count - 1}").is_dir():
        return
    import veneer

    found = shapes(veneer.load_model(MODEL, dtype=torch.bfloat16, device="cpu")[0])
    for n in range(count):
        own = folder / f"a{n}"
        if own.is_dir():
            continue
        if n < DISTINCT:
            write_adapter(found, own, RANK, n)
            continue
        scratch = folder / f".a{n}"
        scratch.mkdir(parents=True, exist_ok=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (scratch / name).unlink(missing_ok=True)
            os.link(folder / f"a{n % DISTINCT}" / name, scratch / name)
        scratch.rename(own)


def shapes(model: Any) -> dict[str, tuple[int, int]]:
    """(out, in) of every adapted layer."""
    modules = model.named_modules()
    return {path: tuple(m.weight.shape) for path, m in modules if path.rpartition(".")[2] in SITES}


def write_adapter(layers: dict[str, tuple[int, int]], folder: Path, rank: int, seed: int) -> None:
    """One adapter of random factors, as PEFT's folder."""
    import torch
    from safetensors.torch import save_file

    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(SITES)}
    g, tensors = torch.Generator().manual_seed(seed), {}
    for path, (out, inputs) in layers.items():
        for name, shape, size in (("A", (rank, inputs), inputs**-0.5), ("B", (out, rank), 0.02)):
            key = f"base_model.model.{path}.lora_{name}.weight"
            tensors[key] = (torch.randn(shape, generator=g) * size).bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}), encoding="utf-8")


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Random tokens."""
    import torch

    g = torch.Generator().manual_seed(seed)
    return torch.randint(100, 40_000, (count, PROMPT), generator=g).tolist()
