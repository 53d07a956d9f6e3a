"""GGUF models of the Llama family: converted once into a transformers folder, then mapped from there.

``load_converted`` gives model and tokenizer. The first time the file's tensors are dequantised, its metadata become a
config and a tokenizer, and all of it goes into the cache: ``$VENEER_CACHE``, else ``~/.cache/veneer``. After that the
weights are mapped into memory as they lie on disk, privately: pages are read when touched, and training in place copies
a page instead of writing to the file.

GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from veneer import cache
from veneer.errors import UserError
from veneer.models.gguf_tokenizer import build_tokenizer
from veneer.models.load import check_safetensors

FORMAT = 1  # of what a conversion writes; part of the cache's key
WEIGHTS = "model.safetensors"

# GGUF's architecture → transformers' config class.
ARCHITECTURES = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}

# Config field ← metadata key after "<architecture>.".
CONFIG = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}

TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def load_converted(path: Path, dtype: torch.dtype) -> tuple[torch.nn.Module, object]:
    """Model in eval mode on the CPU, and tokenizer, of a GGUF file; from the cache when it was converted before."""
    try:
        return _open(converted(path, dtype))
    except UserError:
        raise
    except Exception:  # whatever damage the cache has come to: it can be made again
        shutil.rmtree(converted(path, dtype))
    return _open(converted(path, dtype))


def _open(folder: Path) -> tuple[torch.nn.Module, object]:
    from transformers import PreTrainedTokenizerFast

    return map_folder(folder), PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def converted(path: Path, dtype: torch.dtype) -> Path:
    """The transformers folder of a GGUF file in the cache, converted now if it is not there whole.

    The folder is written under a temporary name and renamed, so that it is whole or absent; of two processes that
    convert at once the second finds the first one's and drops its own.

    Raises:
        UserError: the file is truncated, corrupt or of another architecture, or the cache cannot be written.
    """
    from safetensors import SafetensorError

    root = cache.folder("gguf")
    folder = root / f"{path.stem}-{_fingerprint(path)}-{str(dtype).removeprefix('torch.')}"
    if folder.is_dir():
        try:
            check_safetensors(folder / WEIGHTS)
            return folder
        except UserError:  # it can be made again
            shutil.rmtree(folder, ignore_errors=True)
    try:
        root.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=root))
    except OSError as error:
        raise UserError(
            f"the cache {root} cannot be written ({error.strerror}); name another folder in VENEER_CACHE"
        ) from None
    try:
        convert(path, draft, dtype)
        draft.rename(folder)
    except (OSError, SafetensorError) as error:
        if not folder.is_dir():
            raise UserError(
                f"{path} cannot be converted into {root} ({error}); make room there, or name another folder in "
                "VENEER_CACHE"
            ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _fingerprint(path: Path) -> str:
    """Of size, time and both ends of the file: as good as all of it here, and as fast for a large one."""
    size, ends = path.stat().st_size, 1 << 20
    digest = hashlib.sha256(f"{FORMAT} {size} {path.stat().st_mtime_ns}".encode())
    with path.open("rb") as file:
        digest.update(file.read(ends))
        file.seek(max(0, size - ends))
        digest.update(file.read(ends))
    return digest.hexdigest()[:16]


def convert(path: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the model and tokenizer of a GGUF file into ``folder`` as transformers reads them, weights in ``dtype``."""
    from safetensors.torch import save_file

    reader, facts = read_gguf(path)
    try:
        config = _config(path, facts, {tensor.name: tensor for tensor in reader.tensors})
        model = _empty(config, dtype)
    except (TypeError, KeyError, ZeroDivisionError, AssertionError, RuntimeError) as error:
        raise UserError(f"{path} describes no model in its metadata ({error!r}); fetch or convert it again") from None
    tensors = {name: tensor for tensor in reader.tensors if (name := _transformers_name(tensor.name))}
    _check_shapes(path, tensors, model)
    weights = {name: _dense(path, tensor, name, config).to(dtype) for name, tensor in tensors.items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    try:
        tokenizer = build_tokenizer(path, facts, config.max_position_embeddings)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises no narrower one
        raise UserError(f"{path}: its tokenizer cannot be built ({error!r}); fetch or convert it again") from None
    tokenizer.save_pretrained(folder)


def _check_shapes(path: Path, tensors: dict[str, object], model: torch.nn.Module) -> None:
    """Every tensor of the model is there in its shape, and none besides."""
    found = {name: tuple(tensor.shape.tolist()[::-1]) for name, tensor in tensors.items()}
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{path} is no plain {model.config.model_type} model: tensor {name} should be "
                f"{wanted.get(name, 'absent')} and is {found.get(name, 'absent')}; this form of it cannot be read"
            )


def read_gguf(path: Path) -> tuple[object, dict[str, object]]:
    """The ``gguf`` package's reader and the metadata as plain values.

    Raises:
        UserError: the package is missing, or the file is truncated or no GGUF.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f'reading {path} needs the package gguf; get it with: pip install "veneer[gguf]"') from None
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file (it does not begin with GGUF); fetch it again")
    try:
        reader = GGUFReader(path)
        return reader, {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise UserError(f"{path} is truncated or corrupt ({error}); fetch it again") from None


def _config(path: Path, facts: dict, tensors: dict) -> object:
    """The transformers config that the metadata and the presence of some tensors describe."""
    import transformers

    kind = facts.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise UserError(
            f'{path} is of the architecture "{kind}"; of GGUF files Veneer reads {", ".join(ARCHITECTURES)}'
        )

    def fact(key: str, default: object = None) -> object:
        if (value := facts.get(f"{kind}.{key}", default)) is None:
            raise UserError(f'{path} lacks "{kind}.{key}" in its metadata; fetch or convert the model again')
        return value

    values = {field: fact(key) for field, key in CONFIG.items()}
    heads = values["num_attention_heads"]
    width = fact("attention.key_length", values["hidden_size"] // heads)
    if fact("rope.dimension_count", width) != width or f"{kind}.expert_count" in facts:
        raise UserError(f"{path} turns a part of each head or mixes experts; GGUF files of that form cannot be read")
    tokens = {
        f"{name}_token_id": facts.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    config = getattr(transformers, ARCHITECTURES[kind])(
        **values,
        **tokens,
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        num_key_value_heads=fact("attention.head_count_kv", heads),
        head_dim=width,
        attention_bias="blk.0.attn_q.bias" in tensors,
        tie_word_embeddings="output.weight" not in tensors,
        rope_parameters=_rope(path, kind, facts, tensors, width),
    )
    config.architectures = [ARCHITECTURES[kind].replace("Config", "ForCausalLM")]
    return config


def _rope(path: Path, kind: str, facts: dict, tensors: dict, width: int) -> dict[str, object]:
    """Rotary embedding: base, and how its frequencies are scaled.

    Llama 3's scaling comes as a tensor of divisors, one a frequency: ``factor`` for waves longer than the context of
    its pretraining, 1 for those shorter than a quarter of it, smooth between (arXiv:2407.21783; the four numbers are
    those of Meta's release). A tensor that they do not give back is another scaling.
    """
    theta = float(facts.get(f"{kind}.rope.freq_base", 10000.0))
    scaling = facts.get(f"{kind}.rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors:
        divisors = torch.from_numpy(np.array(tensors["rope_freqs.weight"].data, dtype=np.float32))
        low, high, context, factor = 1.0, 4.0, 8192, float(divisors.max())
        turns = context / (2 * math.pi) * theta ** -(torch.arange(0, width, 2) / width)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        if torch.allclose(1 / divisors, (1 - smooth) / factor + smooth, rtol=1e-4):
            bands = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": context}
            return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **bands}
        scaling = "by a tensor of its own"
    elif scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    elif scaling == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": float(facts[f"{kind}.rope.scaling.factor"])}
    raise UserError(f"{path} scales its rotary embedding ({scaling}) in a way that cannot be read")


def _transformers_name(name: str) -> str | None:
    """Transformers' name of a GGUF tensor; None for what the config says; an unknown one keeps its own name."""
    if name == "rope_freqs.weight":
        return None
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in TENSORS:
        return name
    block = f"model.layers.{match[1]}." if match[1] else ""
    return f"{block}{TENSORS[match[2]]}.{match[3]}"


def _dense(path: Path, tensor: object, name: str, config: object) -> torch.Tensor:
    """One tensor in float32, in the row order of transformers.

    Llama's GGUF files keep the rows of queries and keys as (head, half, 2): pairs that turn together lie side by side,
    where transformers keeps the two halves of a head apart, (head, 2, half).
    """
    from gguf.quants import dequantize

    try:
        dense = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    except NotImplementedError as error:
        raise UserError(f"{path}: {error}; use a conversion of another type, such as Q8_0") from None
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if config.model_type == "llama" and heads:
        dense = dense.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(dense.shape)
    return dense.contiguous()


def _empty(config: object, dtype: torch.dtype) -> torch.nn.Module:
    """The causal model of a config with parameters and buffers on the meta device: shapes alone."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def map_folder(folder: Path) -> torch.nn.Module:
    """The model of a converted folder, in eval mode, its weights mapped from the file."""
    from safetensors.torch import load_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model = _empty(config, config.dtype)
    weights = load_file(folder / WEIGHTS)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    # What no file holds, the rotary frequencies, its own module works out.
    for module in [m for m in model.modules() if any(b.is_meta for b in m.buffers(recurse=False))]:
        module._buffers.update(type(module)(config=config)._buffers)
    return model.eval()
