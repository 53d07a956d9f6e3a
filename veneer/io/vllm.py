"""Plain LoRA as vLLM reads it: one rank, the scale within B, and nothing that vLLM 0.33 refuses.

vLLM knows pairs at linear layers and embeddings, and one saved classification head. It refuses DoRA, changes of biases,
other whole tensors, and starts that moved the base; its older versions and SGLang read neither ``rank_pattern`` nor
``alpha_pattern``. So every pair is filled up with zeros to the largest rank and α is r, which all of them read alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from veneer.core.adapter import Adapter
from veneer.errors import UserError
from veneer.io import certificate
from veneer.io.certificate import Certificate
from veneer.io.files import read_json, read_tensors, staged, write_json, write_tensors
from veneer.io.peft_config import CONFIG, PREFIX, TENSORS, first_match

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
HEADS = ("classifier", "score")
A, B = (".lora_A.weight", ".lora_embedding_A"), (".lora_B.weight", ".lora_embedding_B")
FIELDS = ("peft_type", "base_model_name_or_path", "task_type", "target_modules", "fan_in_fan_out")


def write(
    adapter: Adapter,
    directory: str | Path,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> Certificate:
    """Write the adapter for vLLM, with ``certificate.json`` beside it; the arguments are those of ``peft-lora``.

    Raises:
        UserError: what cannot be plain LoRA, or not within ``rank`` and ``tolerance``; a change of a bias, of a
            convolution or of a whole tensor other than a classification head; a rank beyond 512.
    """
    with staged(directory, last=(CONFIG,)) as scratch:
        found = certificate.write(adapter, scratch, rank=rank, tolerance=tolerance, batches=batches, seed=seed)
        config, tensors = evened(read_json(scratch / CONFIG), read_tensors(scratch / TENSORS))
        write_tensors(scratch / TENSORS, tensors)
        write_json(scratch / CONFIG, config)
    return replace(found, path=Path(directory))


def most(rank: int) -> int:
    """The least ``--max-lora-rank`` with which vLLM takes an adapter of this rank."""
    return next(n for n in RANKS if n >= rank)


def evened(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of a plain LoRA directory with one rank and α = r; the scales go into B.

    Raises UserError for what vLLM refuses.
    """
    kept, saved = {}, {}
    for key, tensor in tensors.items():
        owner = key.rpartition(".")[0].rpartition(".")[2]
        if key.endswith((*A, *B)) and tensor.ndim == 2:
            kept[key] = tensor
        elif owner in HEADS:
            saved[key] = tensor
        else:
            raise UserError(f'vLLM cannot hold {_what(key, tensor)}; export with format="merged" the folded model')
    owners = {key.removeprefix(PREFIX).rpartition(".")[0] for key in saved}
    if len(owners) > 1:
        raise UserError(f"vLLM holds one saved head, and there are {len(owners)}: {', '.join(sorted(owners))}")
    largest = max(t.shape[0] for key, t in kept.items() if key.endswith(A))
    if largest > RANKS[-1]:
        raise UserError(f"rank {largest} is more than the {RANKS[-1]} that vLLM takes; give a smaller rank=")
    scales = _scales(config, kept)
    for key, tensor in kept.items():
        missing = largest - tensor.shape[0 if key.endswith(A) else 1]
        kept[key] = pad(tensor, (0, 0, 0, missing)) if key.endswith(A) else pad(tensor * scales[key], (0, missing))
    written = {name: config[name] for name in FIELDS if config.get(name) is not None}
    written |= {"r": largest, "lora_alpha": largest, "bias": "none"}
    if owners:
        written["modules_to_save"] = [next(iter(owners)).rpartition(".")[2]]
    return dict(sorted(written.items())), kept | saved


def _scales(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """What each B is multiplied by, α/r of its layer."""
    found, alphas = {}, config.get("alpha_pattern") or {}
    for key, tensor in tensors.items():
        end = next((e for e in B if key.endswith(e)), None)
        if end is not None:
            path, rank = key.removeprefix(PREFIX).removesuffix(end), tensor.shape[1]
            match = first_match(alphas, path)
            alpha = config["lora_alpha"] if match is None else alphas[match]
            found[key] = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return found


def _what(key: str, tensor: Tensor) -> str:
    bare = key.removeprefix(PREFIX)
    if key.endswith("lora_B.bias"):
        return f"the change of the bias of {bare.removesuffix('.lora_B.bias')}"
    if key.endswith((*A, *B)):
        return f"a change of the convolution {bare.rpartition('.lora_')[0]}"
    return f"the whole tensor {bare}, which this adapter trains"
