"""The JSON half of a PEFT directory: which fields are understood, what they select, and the numbers of each module.

PEFT matches ``target_modules`` (a list of names, each a whole path or the end of one after a dot; or one regular
expression that must match all of a path; or ``"all-linear"``), leaves out ``exclude_modules`` and whatever lies in
``modules_to_save``, and keeps the blocks of ``layers_to_transform``. Rank and alpha of a module come from the first
key of ``rank_pattern`` and ``alpha_pattern`` that matches ``(.*\\.)?(KEY)$``.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from veneer.core import registry
from veneer.core.registry import Method, PeftMap
from veneer.core.site import type_named
from veneer.errors import UserError, nearest
from veneer.io.files import read_json, typed
from veneer.io.peft_kinds import ENTRIES, PROMPTS, TRANSLATED, VARIANT_FIELDS, VARIANTS, WHOLE
from veneer.io.peft_translate import translated
from veneer.models import architecture

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Fields that say how an adapter was made or is to be trained, and change nothing about what it computes.
BOOKKEEPING = frozenset(
    ("peft_type", "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping")
    + ("runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core")
    + ("qalora_group_size", "fan_in_fan_out", "save_projection", "use_effective_conv2d", "init_ia3_weights")
    + ("num_transformer_submodules", "num_attention_heads", "num_layers", "token_dim", "prompt_tuning_init")
    + ("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "prefix_projection")
    + ("encoder_hidden_size",)
)
# Regularisers of training that our forms leave out; what was trained with them runs the same.
LEFT_OUT = frozenset(("module_dropout", "rank_dropout", "rank_dropout_scale", "boft_dropout"))
UNDERSTOOD = frozenset(
    ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern")
    + ("modules_to_save", "bias", "use_rslora", "init_lora_weights", "ensure_weight_tying", "trainable_token_indices")
    + tuple(VARIANT_FIELDS)
)
# What a field may be, and what the entries of a list in it.
TYPES: dict[str, tuple[tuple[type, ...], tuple[type, ...]]] = {
    "target_modules": ((list, str), (str,)),
    "exclude_modules": ((list, str), (str,)),
    "modules_to_save": ((list,), (str,)),
    "layers_to_transform": ((list, int), (int,)),
    "layers_pattern": ((list, str), (str,)),
    "rank_pattern": ((dict,), ()),
    "alpha_pattern": ((dict,), ()),
    "feedforward_modules": ((list, str), (str,)),
    "use_rslora": ((bool,), ()),
    "use_dora": ((bool,), ()),
    "save_projection": ((bool,), ()),
    "kasa_config": ((dict,), ()),
    "trainable_token_indices": ((list, dict), (int,)),
    "lora_bias": ((bool,), ()),
    "bias": ((str,), ()),
    "init_lora_weights": ((bool, str), ()),
}
# Starts that leave the base alone, those that PEFT derives from the base again, and those that it cannot.
PLAIN_STARTS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
DERIVED_STARTS = ("pissa", "olora")
LOST_STARTS = ("corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class Config:
    """A checked ``adapter_config.json`` and the method that reads its tensors."""

    path: Path
    raw: dict[str, Any]
    method: Method

    @property
    def map(self) -> PeftMap:
        """The method's interchange map."""
        return read_map(self.method)  # type: ignore[return-value]  # a config without one is not made

    @property
    def start(self) -> str:
        """``init_lora_weights`` in lower case; ``true`` when absent."""
        return str(self.raw.get("init_lora_weights", True)).lower()

    @property
    def saved(self) -> list[str]:
        """The names in ``modules_to_save``."""
        return list(self.raw.get("modules_to_save") or [])

    @property
    def kind(self) -> str:
        """The ``peft_type`` whose reader takes the file."""
        return self.raw["peft_type"]

    def feeds_forward(self, path: str) -> bool:
        """Whether IA³ scales the inputs of the module at ``path``."""
        names = self.raw.get("feedforward_modules") or []
        if isinstance(names, str):
            return re.fullmatch(names, path) is not None
        return any(path.endswith(name) for name in names)

    def rank(self, path: str | None = None) -> int:
        """The rank of the module at ``path``; the default one without."""
        return self._number("rank", "rank_pattern", path)

    def scale(self, path: str | None = None) -> float:
        """alpha / r of the module at ``path``, alpha / √r with rsLoRA."""
        r = self.rank(path)
        return self._number("alpha", "alpha_pattern", path) / (math.sqrt(r) if self.raw.get("use_rslora") else r)

    def field(self, name: str, path: str | None = None) -> int | float:
        """Our method's ``rank`` or ``alpha`` for a module: the alpha that gives it its scale."""
        if name == "rank":
            return self.rank(path)
        root = "use_rslora" in self.map.config
        return self._number("alpha", "alpha_pattern", path) if root else self.scale(path) * self.rank(path)

    def _number(self, field: str, pattern: str, path: str | None) -> Any:
        patterns = self.raw.get(pattern) or {}
        key = None if path is None else first_match(patterns, path)
        return self.raw[self.map.fields[field]] if key is None else patterns[key]

    def selected(self, model: nn.Module) -> list[str]:
        """The paths of the modules that the config adapts, in the model's order."""
        return selected(model, self.raw)


def read_config(path: Path) -> Config:
    """Read and check ``adapter_config.json``; raises UserError naming a field that is mistyped or not supported."""
    raw = read_json(path)
    raw = translated(raw, typed(raw, "peft_type", (str,), path), path)
    method = _method(raw, raw["peft_type"], path)
    fields = read_map(method).fields
    if raw["peft_type"] not in PROMPTS:
        typed(raw, "target_modules", TYPES["target_modules"][0], path)
    for field, (kinds, entry) in TYPES.items():
        value = typed(raw, field, kinds, path, None)
        for one in value if isinstance(value, list) else ():
            typed({field: one}, field, entry, path)
    typed(raw, fields.get("dropout", "lora_dropout"), (float,), path, None)
    if "rank" in fields:
        _positive(raw, fields["rank"], (int,), path)
        for key in raw.get("rank_pattern") or {}:
            _positive(raw["rank_pattern"], key, (int,), path)
    for field in ("length", "block_size"):
        if field in fields:
            typed(raw, fields[field], (int,), path)
    if "alpha" in fields:
        typed(raw, fields["alpha"], (float,), path)
        for key in raw.get("alpha_pattern") or {}:
            typed(raw["alpha_pattern"], key, (float,), path)
    _regular(raw, path)
    _refuse_unsupported(raw, method, path)
    return Config(path, raw, method)


def own_map(cls: type) -> PeftMap | None:
    """The interchange map that a method's class itself brings: an inherited one is of another form."""
    return vars(cls).get("peft")


def read_map(method: Method) -> PeftMap | None:
    """The map that reads a method's files: its own, or that of a variant."""
    return own_map(method.cls) or VARIANTS.get(method.name)


def _positive(content: Mapping[str, Any], field: str, kinds: tuple[type, ...], path: Path) -> None:
    if typed(content, field, kinds, path) <= 0:
        raise UserError(f"{path}: {field} is {content[field]}; a number above 0 was expected")


def _regular(raw: Mapping[str, Any], path: Path) -> None:
    """Check that whatever is used as a regular expression is one."""
    expressions = [*(raw.get("rank_pattern") or {}), *(raw.get("alpha_pattern") or {})]
    expressions += [
        raw[f]
        for f in ("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules")
        if isinstance(raw.get(f), str)
    ]
    expressions += raw.get("modules_to_save") or []
    for expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            raise UserError(f"{path}: {expression!r} is not a regular expression: {error}") from None


def _method(raw: Mapping[str, Any], kind: str, path: Path) -> Method:
    """The registered method whose map reads this config: the one that explains the most of its constants."""
    variant = next((name for field, name in VARIANT_FIELDS.items() if raw.get(field) is not None), None)
    if variant is not None:
        return registry.find(variant)
    mapped = [m for m in registry.methods() if own_map(m.cls) is not None]
    # How tensors began, and whether the file holds what a seed gives, says nothing about the form.
    constants = {
        m.name: {k: v for k, v in m.cls.peft.config.items() if k != "save_projection" and (k, v) != _BEGUN}
        for m in mapped
    }
    fitting = [
        m
        for m in mapped
        if m.cls.peft.type == kind.upper() and all(raw.get(k) == v for k, v in constants[m.name].items())
    ]
    if not fitting:
        types = sorted({m.cls.peft.type for m in mapped} | {*TRANSLATED, *WHOLE, *ENTRIES})
        raise UserError(f"{path}: peft_type {kind!r} cannot be read; supported: {', '.join(types)}")
    # rsLoRA is a scale, which is read for every method, so any other constant says more about the form than it does.
    # Of forms whose files are alike, the one that bears the type's name.
    return max(
        fitting, key=lambda m: (len(constants[m.name].keys() - {"use_rslora"}), len(constants[m.name]), _bears(m, kind))
    )


_BEGUN = ("init_weights", True)


def _bears(method: Method, kind: str) -> bool:
    return method.name.replace("-", "") == kind.lower().partition("_")[0]


def _refuse_unsupported(raw: Mapping[str, Any], method: Method, path: Path) -> None:
    mapped = read_map(method)
    assert mapped is not None, "a method is chosen by its map"
    known = BOOKKEEPING | UNDERSTOOD | set(mapped.fields.values()) | mapped.config.keys()
    for field in sorted(LEFT_OUT & raw.keys()):
        if raw[field]:
            warnings.warn(f"{path}: {field}={raw[field]!r} is not known to {method.name}; it runs the same, and would "
                          "train on without it", stacklevel=3)  # fmt: skip
    for field, value in raw.items():
        started = field in LEFT_OUT or (field == "init_weights" and isinstance(value, bool))
        if field not in known and not started and value not in (None, False, [], {}, ""):
            forms = sorted({m.name for m in registry.methods() if own_map(m.cls) is not None})
            raise UserError(
                f"{path}: {field}={value!r} is not supported with peft_type {mapped.type}; what is read: "
                f"{', '.join(forms)}, with the fields {', '.join(sorted(UNDERSTOOD | set(mapped.fields.values())))}"
            )
    bias = raw.get("bias") or "none"
    if bias not in ("none", "all") and not bias.lower().endswith("_only"):
        raise UserError(f"{path}: bias is {bias!r}; 'none', 'all' or 'lora_only' was expected")
    start = str(raw.get("init_lora_weights", True)).lower()
    derived = start in DERIVED_STARTS or re.fullmatch(r"pissa_niter_\d+", start)
    if not derived and start not in (*PLAIN_STARTS, *LOST_STARTS, "none"):
        known = [*PLAIN_STARTS, *DERIVED_STARTS, "pissa_niter_N", *LOST_STARTS]
        raise UserError(f"{path}: init_lora_weights is {start!r}; supported: {', '.join(known)}{nearest(start, known)}")


def selected(model: nn.Module, raw: Mapping[str, Any]) -> list[str]:
    """The paths of the modules that the content of a config adapts, in the model's order."""
    targets = raw["target_modules"]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = _all_linear(model, raw.get("task_type"))
    paths = [path for path, _ in architecture.named_modules(model) if path]
    return [p for p in paths if selects(p, targets, raw)]


def first_match(patterns: Iterable[str], path: str) -> str | None:
    """The first key of a rank or alpha pattern that matches the end of ``path`` after a dot, or all of it."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", path)), None)


def selects(path: str, targets: str | Iterable[str], raw: Mapping[str, Any]) -> bool:
    """Whether PEFT adapts the module at ``path`` under these targets and the other selecting fields of ``raw``."""
    excluded = raw.get("exclude_modules") or []
    if re.fullmatch(excluded, path) if isinstance(excluded, str) else _named(path, excluded):
        return False
    if any(re.match(rf"(^|.*\.){m}($|\..*)", path) for m in raw.get("modules_to_save") or []):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    if path in targets:
        return True
    return _named(path, targets) and _in_layers(path, raw.get("layers_to_transform"), raw.get("layers_pattern"))


def _named(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _in_layers(path: str, layers: int | list[int] | None, patterns: str | list[str] | None) -> bool:
    if layers is None or layers == []:
        return True
    if patterns:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = (re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", path) for p in patterns)
        match = next((m for m in found if m), None)
    else:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", path)
    return match is not None and int(match.group(1)) in ([layers] if isinstance(layers, int) else layers)


def _all_linear(model: nn.Module, task: str | None) -> set[str]:
    """What ``"all-linear"`` stands for: every linear layer but the output head."""
    embeddings = getattr(model, "get_output_embeddings", None)
    head = embeddings() if callable(embeddings) else None
    if head is None and task == "SEQ_CLS":
        head = getattr(model, "score", getattr(model, "classifier", None))
    linear = ((p, m) for p, m in architecture.named_modules(model) if _is_linear(m))
    return {p for p, m in linear if m is not head}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type_named(module, "Conv1D")
