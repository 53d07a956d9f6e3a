"""Writing PEFT directories: only fields that say something, so that older readers do not stumble over the others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.delta import Written
from veneer.core.registry import PeftMap
from veneer.core.site import type_named
from veneer.errors import UserError
from veneer.io.files import staged, write_json, write_tensors
from veneer.io.peft_config import CONFIG, PREFIX, TENSORS, first_match, own_map, selects
from veneer.io.peft_tensors import check_layer, to_disk
from veneer.io.plain import Factors, native_factors, plain_factors, whole_tensors
from veneer.models import architecture

PLAIN = PeftMap("LORA", fields={"rank": "r", "alpha": "lora_alpha"}, keys={"A": "lora_A", "B": "lora_B"})
TASKS = {  # what a class of transformers is called at its end → PEFT's task type
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# The heads that PEFT adds to modules_to_save by itself for a task, and then wants to find in the file.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
MERGED = 'export with format="merged" writes the folded model'


def write(adapter: Adapter, directory: str | Path, *, plain: bool = False) -> Path:
    """Write the adapter as a PEFT directory; returns it.

    A form that PEFT has (LoRA, rsLoRA, DoRA) is written as such, every other that is plain LoRA in effect as plain
    LoRA, with each site's scale in alpha. ``plain`` writes plain LoRA in any case, which is what servers load.

    Raises:
        UserError: what PEFT cannot express, with the nearest offer.
    """
    directory = Path(directory)
    mapped = None if plain else _own_map(adapter)
    if mapped is None:
        factors, mapped = plain_factors(adapter, "a PEFT adapter"), PLAIN
    else:
        factors = native_factors(adapter, mapped.keys, "a PEFT adapter")
    if not factors:
        raise UserError(
            f"{adapter.recipe} changes whole tensors only, and a PEFT directory needs a pair of factors; {MERGED}"
        )
    tensors: dict[str, Tensor] = {}
    _even_bias(factors)
    for f in factors:
        check_layer(f.site)
        for name, value in ({"lora_A": f.A, "lora_B": f.B} | f.extras).items():
            key, tensor = to_disk(f.site, name, value)
            tensors[key] = tensor
    config = _config(adapter, factors, mapped)
    tensors |= _saved(adapter, factors, config)
    with staged(directory, last=(CONFIG,)) as scratch:
        write_tensors(scratch / TENSORS, tensors)
        write_json(scratch / CONFIG, dict(sorted(config.items())))
    return directory


def _own_map(adapter: Adapter) -> PeftMap | None:
    """The map by which all deltas can be written in their own form, if there is one of PEFT's LoRA family."""
    deltas = [d for d in adapter.deltas.values() if not isinstance(d, Written) and d.site.name is None]
    maps = {type(d): own_map(type(d)) for d in deltas}
    mapped = next(iter(maps.values()), None)
    if len(maps) != 1 or mapped is None or mapped.type != "LORA":
        return None
    return mapped if {"lora_A", "lora_B"} <= set(mapped.keys.values()) else None


def _even_bias(factors: list[Factors]) -> None:
    """``lora_bias`` is for all modules or none: give those without a bias change one of 0."""
    if not any("lora_B.bias" in f.extras for f in factors):
        return
    for f in factors:
        if f.site.kind == "embedding":
            raise UserError(
                f"PEFT has no lora_bias for embeddings, and {f.path} is one beside changed biases; {MERGED}"
            )
        f.extras.setdefault("lora_B.bias", f.B.new_zeros(f.site.out_features))


def _config(adapter: Adapter, factors: list[Factors], mapped: PeftMap) -> dict[str, Any]:
    model = adapter.model
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "task_type": _task(model),
        "target_modules": targets(model, [f.path for f in factors]),
    }
    config |= {k: v for k, v in mapped.config.items() if k != "use_rslora"}
    if any("lora_B.bias" in f.extras for f in factors):
        config["lora_bias"] = True
    ranks = {f.path: f.rank for f in factors}
    root = bool(mapped.config.get("use_rslora")) and all(f.rank == factors[0].rank for f in factors)
    alphas = {f.path: _whole_number(f.scale * (f.rank**0.5 if root else f.rank)) for f in factors}
    if root:
        config["use_rslora"] = True
    config["r"], ranks = pattern(ranks)
    config["lora_alpha"], alphas = pattern(alphas)
    config |= {k: v for k, v in (("rank_pattern", ranks), ("alpha_pattern", alphas)) if v}
    if any(type_named(f.site.module, "Conv1D") for f in factors):
        config["fan_in_fan_out"] = True
    return config


def _whole_number(value: float) -> int | float:
    near = round(value)
    return near if abs(value - near) <= 1e-9 * max(1, abs(near)) else value


def _task(model: nn.Module) -> str | None:
    bases = [c.__name__ for c in type(model).__mro__]
    return next((task for end, task in TASKS.items() if any(b.endswith(end) for b in bases)), None)


def targets(model: nn.Module, paths: Iterable[str]) -> list[str] | str:
    """The shortest ``target_modules`` that selects exactly ``paths``: last names, whole paths, or an expression."""
    paths = list(paths)
    modules = [p for p, _ in architecture.named_modules(model) if p]
    names: list[str] = []
    for last in dict.fromkeys(p.rpartition(".")[2] for p in paths):
        meant = [p for p in paths if p.rpartition(".")[2] == last]
        names += [last] if set(meant) == {m for m in modules if selects(m, [last], {})} else meant
    if {m for m in modules if selects(m, names, {})} == set(paths):
        return names
    return "|".join(re.escape(p) for p in paths)


def pattern(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the most common value, a pattern for the modules that have another), such that each finds its own."""
    common = Counter(values.values()).most_common(1)[0][0]
    other = {path: v for path, v in values.items() if v != common}
    if all((other[k] if (k := first_match(other, path)) is not None else common) == v for path, v in values.items()):
        return common, other
    return common, {f"^{re.escape(path)}": v for path, v in other.items()}


def _saved(adapter: Adapter, factors: list[Factors], config: dict[str, Any]) -> dict[str, Tensor]:
    """Whole tensors, and the fields that make PEFT load them; ``config`` is completed in place."""
    model, whole = adapter.model, whole_tensors(adapter)
    adapted = {f.path for f in factors}
    out: dict[str, Tensor] = {}
    names: list[str] = []
    for name, value in whole.items():
        owner, _, last = name.rpartition(".")
        if owner not in adapted:
            names.append(owner)
        elif last == "bias":
            config["bias"] = "lora_only"
            out[f"{PREFIX}{owner}.base_layer.bias"] = value
        else:
            raise UserError(
                f"{name} trains as a whole beside factors on the same layer, which PEFT cannot hold; {MERGED}"
            )
    heads = HEADS.get(config["task_type"], ())
    names = list(dict.fromkeys(names))
    modules = [p for p, _ in model.named_modules(remove_duplicate=False) if "veneer" not in p.split(".")]
    for path in modules:
        if path and any(path.endswith(n) for n in (*names, *heads)):
            if path in adapted:
                raise UserError(
                    f"PEFT saves {path} as a whole, as its name ends like a saved module's, and it is adapted; {MERGED}"
                )
            for last, p in model.get_submodule(path).named_parameters(remove_duplicate=False):
                if "veneer" not in last.split("."):
                    out[f"{PREFIX}{path}.{last}"] = whole.get(f"{path}.{last}", p.detach())
    if names:
        config["modules_to_save"] = names
    return out
