"""PEFT directories of base tensors themselves: whole modules (``LN_TUNING``) and rows of tables (trained tokens).

PEFT's layer-norm tuning keeps a trained copy of any module that it is told of, not of norms alone, so that whatever
trains whole tensors and no factors can be written so. Its trained tokens are rows of an embedding, kept as they are and
not as differences.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.errors import UserError, nearest
from veneer.io.files import read_json, read_tensors, typed
from veneer.io.peft_config import BOOKKEEPING, CONFIG, PREFIX, TENSORS
from veneer.io.peft_targets import HEADS, targets, task
from veneer.io.plain import whole_tensors
from veneer.models import architecture
from veneer.models.fingerprint import base_fingerprint

COPY = "ln_tuning_layers"
ROWS = "trainable_tokens_delta"
_KNOWN = BOOKKEEPING | {"target_modules", "exclude_modules", "modules_to_save", "token_indices", "init_weights"}


def read(model: nn.Module, directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(description, state) of a directory whose file holds base tensors, as full fine-tuning of these alone."""
    path, file = directory / CONFIG, directory / TENSORS
    raw = read_json(path)
    for field, value in raw.items():
        if field not in _KNOWN and value not in (None, False, [], {}, ""):
            raise UserError(f"{path}: {field}={value!r} is not supported with peft_type {raw['peft_type']}")
    own = dict(model.named_parameters(remove_duplicate=False))
    values: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for key, tensor in read_tensors(file).items():
        bare = key.removeprefix(PREFIX).replace(f".{COPY}.", ".").replace(".base_layer.", ".")
        if bare.endswith(f".{ROWS}"):
            rows[f"{bare.removesuffix(f'.{ROWS}').removesuffix('.token_adapter')}.weight"] = tensor
        else:
            values[bare] = tensor
    if rows:
        values |= with_rows(model, typed(raw, "token_indices", (list, dict), path), rows, file)
    for name, value in values.items():
        if name not in own:
            raise UserError(f"{file}: {name} is in no place of this {type(model).__name__}{nearest(name, own)}")
        if own[name].shape != value.shape:
            raise UserError(
                f"{file}: {name} has shape {tuple(value.shape)}, this model's {tuple(own[name].shape)}: it was made "
                "for another model"
            )
    if not values:
        raise UserError(f"{file} holds no trained tensor: the file is empty or incomplete")
    values = with_ties(model, values, file)
    trained = [n for n, _ in heads(model)]
    state = {f"{n}.value": t.float() for n, t in values.items()}
    description = {
        "recipe": "full(norms=True)",
        "seed": 0,
        "select": "all",
        "sites": list(values),
        "fields": {},
        "train": trained,
        "phase": 0,
        "base": base_fingerprint(model, without=[*values, *trained]),
    }
    state |= {f"train:{n}": p.detach().float() for n, p in heads(model) if n not in values}
    return description, state


def heads(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The tensors of a task head, which train with every adapter."""
    from veneer.parts.attach import trained_tensors

    own = dict(model.named_parameters(remove_duplicate=False))
    return [(n, own[n]) for n in trained_tensors(model, ())]


def with_ties(model: nn.Module, values: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Each tensor once under the name of the first layer that shares it; PEFT's copies are apart, ours are one."""
    for group in architecture.tied(model):
        given = [n for n in group if n in values]
        if given and (len(given) < len(group) or not all(torch.equal(values[n], values[given[0]]) for n in given)):
            raise UserError(
                f"{path} trains {given[0]} apart from {next(n for n in group if n != given[0])}, which share one "
                "tensor in this model; call veneer.untie(model) before loading"
            )
        for name in given[1:]:
            del values[name]
    return values


def with_rows(
    model: nn.Module, indices: list[int] | Mapping[str, list[int]] | None, rows: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """The tables of ``rows`` (k, d), by name, with these rows at ``indices``: a list, or lists by module name."""
    out: dict[str, Tensor] = {}
    own = dict(model.named_parameters(remove_duplicate=False))
    if indices and not rows:
        raise UserError(f"{path} has no rows for trainable_token_indices; the file is incomplete: save it again")
    for name, values in rows.items():
        module = name.removesuffix(".weight")
        where = indices
        if isinstance(indices, Mapping):
            where = next((v for k, v in indices.items() if module == k or module.endswith(f".{k}")), None)
        if not _token_list(where) or len(where) != len(values) or own[name].shape[1:] != values.shape[1:]:
            raise UserError(
                f"{path}: the trained rows of {name} have shape {tuple(values.shape)}, which does not fit the token "
                f"indices in {CONFIG} and this model's {tuple(own[name].shape)}"
            )
        if min(where) < 0 or max(where) >= len(own[name]):
            raise UserError(
                f"{path}: token {max(where)} is beyond this model's vocabulary of {len(own[name])}; call "
                f"model.resize_token_embeddings({max(where) + 1}) first"
            )
        table = own[name].detach().clone()
        table[torch.tensor(where)] = values.to(table.dtype)
        twins = next((group for group in architecture.tied(model) if name in group), [name])
        out |= dict.fromkeys(twins, table)
    return out


def _token_list(where: Any) -> bool:
    return isinstance(where, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in where)


def content(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of an adapter that changes whole tensors only."""
    model, whole = adapter.model, whole_tensors(adapter)
    heads = HEADS.get(task(model), ())
    ahead = {n: t for n, t in whole.items() if n.rpartition(".")[0].endswith(heads)} if heads else {}
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in whole if name not in ahead))
    _check_owners(model, owners, whole)
    tensors = {PREFIX + n: t for n, t in ahead.items()}
    for owner in owners:
        module = model.get_submodule(owner)
        for last, p in module.named_parameters(recurse=False):
            tensors[f"{PREFIX}{owner}.{COPY}.{last}"] = whole.get(f"{owner}.{last}", p.detach())
    config = {
        "peft_type": "LN_TUNING",
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "task_type": task(model),
        "target_modules": targets(model, owners),
    }
    return config, tensors


def _check_owners(model: nn.Module, owners: Iterable[str], whole: Mapping[str, Tensor]) -> None:
    for owner in owners:
        module = model.get_submodule(owner)
        inner = next((n for n, m in module.named_children() if not n.startswith("veneer")), None)
        if inner is not None:
            raise UserError(
                f"{_called(owner)} holds a trained tensor and further modules ({inner}), which PEFT cannot keep "
                'apart; export with format="merged" writes the folded model'
            )
        made = next((n for n in whole if n.rpartition(".")[0] == owner and not _has(module, n)), None)
        if made is not None:
            raise UserError(
                f"{made} is a tensor that the base does not have, for which PEFT has no place; export with "
                'format="merged" writes the folded model'
            )


def _has(module: nn.Module, name: str) -> bool:
    return module._parameters.get(name.rpartition(".")[2]) is not None


def _called(owner: str) -> str:
    return owner or "the model's root"
