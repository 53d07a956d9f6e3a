"""A GGUF LoRA file, as llama.cpp loads it.

Each adapted tensor goes in under the name of the base tensor in the GGUF model + ``.lora_a`` (r, in) and ``.lora_b``
(out, r). llama.cpp multiplies every product by ``adapter.lora.alpha`` over that tensor's own rank, so one alpha is
stored and what a site's scale differs from it by goes into its B. Models with Llama's rotary embedding have their q
and k rows interleaved when they are converted, and B's rows with them. The factors of the token embedding are looked
up by token, so its A lies transposed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.errors import UserError
from veneer.io.files import write_whole
from veneer.io.lowering import Lowered, lower
from veneer.io.plain import Factors, plain_factors, whole_tensors
from veneer.models import architecture

# transformers' model_type → (GGUF architecture, whether the converter interleaves the rows of q and k).
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "smollm3": ("smollm3", True),
    "granite": ("granite", True),
    "olmo": ("olmo", True),
    "olmo2": ("olmo2", False),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma": ("gemma", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "phi3": ("phi3", False),
    "gpt2": ("gpt2", False),
}
TYPES = ("f32", "f16")


class Target(NamedTuple):
    """A base tensor in the GGUF model and the rows of it that are interleaved (number of heads), or None."""

    name: str
    heads: int | None


def write(
    adapter: Adapter,
    path: str | Path,
    *,
    dtype: str = "f32",
    rank: int | None = None,
    tolerance: float | None = None,
) -> Path:
    """Write ``adapter`` as a GGUF LoRA file.

    Args:
        adapter: plain LoRA at every site, on layers that the GGUF model has; no bias changes, no trained base tensors.
        path: the file.
        dtype: type of the factors, ``f32`` or ``f16``.
        rank, tolerance: let any form that folds become the nearest plain LoRA, see ``lowering.lower``.

    Returns:
        The path written.

    Raises:
        UserError: what cannot be expressed, with the nearest offer; an architecture that is not known here.
    """
    if dtype not in TYPES:
        raise UserError(f"dtype={dtype!r} is not a type of GGUF factors written here; give one of {', '.join(TYPES)}")
    model = adapter.model
    arch, interleaved = _architecture(model)
    near = rank is not None or tolerance is not None
    lowered = (
        lower(adapter, rank, tolerance) if near else Lowered(plain_factors(adapter, "a GGUF adapter", within=""), [])
    )
    sites = lowered.factors
    _refuse(adapter, sites, lowered.within)
    names = _names(arch, model)
    targets = [_target(s, names, interleaved, model) for s in sites]
    alpha = _alpha(sites)
    path = Path(path)
    write_whole(path, lambda scratch: _fill(scratch, arch, alpha, sites, targets, dtype, adapter))
    return path


def _gguf():
    try:
        import gguf
    except ImportError:
        raise UserError("writing GGUF needs the gguf package: pip install 'veneer[gguf]'") from None
    return gguf


def _architecture(model: nn.Module) -> tuple[str, bool]:
    kind = getattr(architecture.text_config(model), "model_type", None)
    if kind not in ARCHITECTURES:
        raise UserError(
            f"a GGUF adapter for {kind or type(model).__name__!r} models is not written: how their rows lie in GGUF is "
            f'not known here; known: {", ".join(ARCHITECTURES)}; or export with format="merged" and convert'
        )
    return ARCHITECTURES[kind]


def _names(arch: str, model: nn.Module):
    gguf = _gguf()
    kind = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    return gguf.get_tensor_name_map(kind, len(architecture.blocks(model)))


def _refuse(adapter: Adapter, sites: list[Factors], within: Container[str]) -> None:
    offer = 'export with format="merged" and convert the model'
    whole = next((name for name in whole_tensors(adapter) if name not in within), None)
    if whole:
        raise UserError(f"a GGUF adapter holds no whole tensors, but {whole} was trained; {offer}")
    changed = next((s.path for s in sites if s.extras), None)
    if changed:
        raise UserError(
            f"a GGUF adapter holds no bias changes, but {adapter.recipe} changes the bias of {changed}; {offer}"
        )
    tied = {name.rpartition(".")[0] for group in architecture.tied(adapter.model) for name in group}
    both = next((s.path for s in sites if s.path in tied), None)
    if both:
        raise UserError(
            f"{both} shares its weight with another layer and a GGUF model stores it once, so the adapter would act "
            f"on both ends; leave it out of `sites`, or {offer}"
        )


def _target(site: Factors, names, interleaved: bool, model: nn.Module) -> Target:
    name = names.get_name(f"{site.path}.weight", try_suffixes=(".weight",))
    if name is None or site.site.kind == "conv":
        raise UserError(
            f"{site.path} has no tensor in GGUF's {type(model).__name__}; leave it out of `sites`, or export with "
            'format="merged"'
        )
    role = architecture.role(site.path, model.get_submodule(site.path), model)
    return Target(name, architecture.heads(model, role) if interleaved and role in ("q", "k") else None)


def interleave(B: Tensor, heads: int) -> Tensor:
    """Rows of each head's two halves, one by one in turn: from transformers' rotary layout to llama.cpp's.

    Args:
        B: (out, r) with out = heads · 2 · half.
        heads: query heads for q, key–value heads for k.
    """
    return B.reshape(heads, 2, B.shape[0] // heads // 2, B.shape[1]).transpose(1, 2).reshape(B.shape)


def _alpha(sites: list[Factors]) -> float:
    """The scale times rank that most sites have: their B goes in as it is."""
    counted = Counter(float(s.scale * s.rank) for s in sites if s.scale)
    return counted.most_common(1)[0][0] if counted else 1.0


def _fill(
    path: Path, arch: str, alpha: float, sites: list[Factors], targets: list[Target], dtype: str, adapter: Adapter
) -> None:
    gguf = _gguf()
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(adapter.name)
    writer.add_description(f"Veneer adapter {adapter.recipe}")
    for site, target in zip(sites, targets):
        A, B = site.A.float(), site.B.float() * (site.scale * site.rank / alpha)
        if target.heads is not None:
            B = interleave(B, target.heads)
        if site.site.kind == "embedding":
            A = A.T
        for end, factor in ((".lora_a", A), (".lora_b", B)):
            array = factor.detach().cpu().contiguous().numpy()
            writer.add_tensor(target.name + end, array.astype("float16") if dtype == "f16" else array)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
