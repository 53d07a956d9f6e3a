"""Reading PEFT directories: any method whose file brings a map of its tensors, on the base it was made for or an equal.

What is in the directory is used or named in an error; nothing is passed over in silence.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.site import Site, all_sites, site_at
from veneer.errors import UserError, nearest
from veneer.fields import fields_of
from veneer.io import peft_entries, peft_loftq, peft_mixture, peft_prompt, peft_whole
from veneer.io.files import read_json, read_tensors, same, typed
from veneer.io.peft_config import CONFIG, TENSORS, Config, read_config, selects
from veneer.io.peft_kinds import ALTERNATIVES, DERIVED, ENTRIES, KINDS, PROMPTS, TRANSLATED, WHOLE, lie
from veneer.io.peft_start import starts
from veneer.io.peft_tensors import Content, check_layer, ending, sort, to_dense
from veneer.io.peft_translate import tensors_of
from veneer.models import architecture
from veneer.models.fingerprint import base_fingerprint
from veneer.parts.restore import attach_from


def read(
    model: nn.Module,
    directory: str | Path,
    *,
    name: str = "default",
    initial: str | Path | None = None,
    force: bool = False,
) -> Adapter:
    """Attach the adapter in a PEFT directory to ``model``.

    Args:
        model: the base; its weights are compared where the directory holds any.
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: of the adapter on this model.
        initial: the directory that PEFT saved before training, for starts that moved part of the base and cannot be
            derived again (CorDA, LoRA-GA), or only roughly (``pissa_niter_N``).
        force: load although base tensors in the directory differ from this model's.

    Raises:
        UserError: naming the file and the field, tensor or module that does not fit.
    """
    directory = Path(directory)
    kind = str(typed(read_json(directory / CONFIG), "peft_type", (str,), directory / CONFIG)).upper()
    if (
        initial is not None
        and kind in KINDS.keys() | TRANSLATED.keys() | {*PROMPTS, *WHOLE, *ENTRIES}
        and kind != "LORA"
    ):
        raise UserError(f"initial={str(initial)!r} is for LoRA, whose starts may move the base; {directory} is {kind}")
    if kind == peft_mixture.KIND:

        def expert(home: Path) -> Adapter:
            return read(model, home, name=f"{name} expert", force=force)

        return attach_from(model, *peft_mixture.read(model, directory, expert), name=name, force=True)
    if kind in WHOLE:
        return attach_from(model, *peft_whole.read(model, directory), name=name, force=True)
    if kind in ENTRIES:
        return attach_from(model, *peft_entries.read(model, directory), name=name, force=True)
    config = read_config(directory / CONFIG)
    tensors = directory / TENSORS
    if config.kind in PROMPTS:
        return peft_prompt.read(model, config, read_tensors(tensors), tensors, name)
    content = _content(config, kind, model, tensors)
    _check_selection(config, content, model, tensors)
    whole = {path: site_at(model, path) for path in content.sites}
    for path, site in whole.items():
        check_layer(site, config.kind)
        _check_complete(config, content.sites[path], site, tensors)
    state = _whole_tensors(config, content, model, tensors, force)
    trained = [key.removeprefix("train:") for key in state]
    begun = starts(config, whole, model, None if initial is None else Path(initial))
    parts = _parts(config, model, whole)
    for path, site in whole.items():
        state |= _site_state(config, content.sites[path], site, parts[path], begun.get(path), tensors)
    description = _description(config, content, parts, trained, model)
    description["recipe"] += peft_loftq.recipe(config, whole, parts, model)
    adapter = attach_from(model, description, state, name=name, force=True)
    _check_derived(adapter, content, tensors)
    return adapter


def _content(config: Config, kind: str, model: nn.Module, path: Path) -> Content:
    """The tensors of the file, told apart."""
    tensors = tensors_of(kind, read_tensors(path), path)
    return sort(tensors, config.map.keys.values(), model, path, DERIVED.get(config.kind, ()))


def _check_derived(adapter: Adapter, content: Content, path: Path) -> None:
    """Projections in the file must be those that the key in the config gives, which are the ones that run."""
    for name, copies in content.derived.items():
        own = getattr(adapter.shared, name.rpartition("_")[2]).cpu()
        if any(
            t.shape != own.shape or not torch.allclose(t.float(), own.float(), rtol=1e-5, atol=1e-7) for t in copies
        ):
            adapter.remove()
            raise UserError(
                f"{path}: its {name} is not what projection_prng_key in {CONFIG} gives here: it was changed, or drawn "
                "by another version; take the adapter to plain LoRA in PEFT (convert_to_lora) and load that"
            )


def _check_selection(config: Config, content: Content, model: nn.Module, path: Path) -> None:
    """What the config selects and what the file holds must be the same modules."""
    selected = config.selected(model)
    without = [p for p in selected if p not in content.sites]
    beyond = [p for p in content.sites if p not in set(selected)]
    if without and content.sites:
        raise UserError(
            f"{path} has no tensors for {_some(without)}, which target_modules in {config.path.name} selects: "
            "the file is incomplete, or was made for another model"
        )
    if beyond:
        raise UserError(
            f"{path} has tensors for {_some(beyond)}, which target_modules in {config.path.name} does not select: "
            "the two files do not belong together"
        )
    if not content.sites:
        raise UserError(
            f"{path} holds no factors of {config.method.name} for any module: the file is empty or incomplete"
        )
    targets = config.raw["target_modules"]
    names = [name for name, _ in model.named_modules()]  # one that is left out is there all the same
    idle = [] if isinstance(targets, str) else [t for t in targets if not any(selects(p, [t], {}) for p in names)]
    if idle:
        warnings.warn(f"{config.path}: target_modules names {_some(idle)}, which this model lacks", stacklevel=2)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _check_complete(config: Config, own: dict[str, Tensor], site: Site, path: Path) -> None:
    if site.kind == "conv" and "lokr_w2" in own and len(site.module.kernel_size) == 1:
        raise UserError(
            f"{path}: PEFT's LoKr multiplies over the wrong axes at a Conv1d like {site.path}, so that no adapter here "
            "would compute what it does there"
        )
    products = {part for pair in ALTERNATIVES.values() for part in pair}
    for name in (n for n in config.map.keys.values() if n not in products):
        if name not in own and not all(n in own for n in ALTERNATIVES.get(name, (name,))):
            raise UserError(
                f"{path} has no {ending(site, name)} for {site.path}; the file is incomplete: save it again"
            )


def _whole_tensors(config: Config, content: Content, model: nn.Module, path: Path, force: bool) -> dict[str, Tensor]:
    """The base tensors that the adapter brings trained, as ``train:`` entries of the state."""
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    saved = _saved_tensors(config, content, model, path)
    bias = config.raw.get("bias") or "none"
    out = peft_whole.with_rows(model, config.raw.get("trainable_token_indices"), content.tokens, path)
    for name, value in (content.base | content.under).items():
        here = own[name]
        if here.shape != value.shape:
            raise UserError(_misfit(name, here, value, path, model))
        if name in saved or (bias != "none" and name.endswith("bias")):
            out[name] = value
        elif not same(here.detach(), value):
            if name not in content.under and _owner(model, name) in _ends(model):
                out[name] = value
            elif name not in content.under:
                raise UserError(
                    f"{path} holds {name}, which modules_to_save in {config.path.name} does not name and which differs "
                    "from this model's; add its module there or take the tensor out"
                )
            elif not force:
                raise UserError(
                    f"{path} was made on another base: its copy of {name} differs from this model's; load it on that "
                    "base, or with force=True if you are sure"
                )
    _check_ties(out, model, path)
    for name, p in _new_head(model):
        out.setdefault(name, p.detach())
    return {f"train:{name}": value.to(torch.float32) for name, value in out.items() if name not in _repeats(out, model)}


def _saved_tensors(config: Config, content: Content, model: nn.Module, path: Path) -> set[str]:
    """The names of the parameters of ``modules_to_save``, each of which must be in the file."""
    modules = [p for p, _ in architecture.named_modules(model)]
    modules += [n.rpartition(".")[0] for group in architecture.tied(model) for n in group]
    found = {p for p in modules if p and any(p.endswith(name) for name in config.saved)}
    if config.saved and not found:
        raise UserError(
            f"{config.path}: modules_to_save names {_some(config.saved)}, none of which this {type(model).__name__} has"
            f"{nearest(config.saved[0], [p.rpartition('.')[2] for p in modules])}"
        )
    names = {f"{p}.{n}" for p in found for n, _ in model.get_submodule(p).named_parameters(remove_duplicate=False)}
    missing = sorted(n for n in names if n not in content.base and ".veneer." not in f".{n}")
    if missing:
        raise UserError(
            f"{path} has no {missing[0]}, which modules_to_save in {config.path.name} promises; save it again"
        )
    return names


def _misfit(name: str, here: Tensor, value: Tensor, path: Path, model: nn.Module) -> str:
    shapes = f"{path}: {name} has shape {tuple(value.shape)}, this model's has {tuple(here.shape)}"
    if _owner(model, name) in _ends(model) and here.ndim == 2:
        return f"{shapes}: the vocabulary differs; call model.resize_token_embeddings({value.shape[0]}) first"
    return f"{shapes}; build the model with the same number of labels and sizes as the adapter's"


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _ends(model: nn.Module) -> list[nn.Module | None]:
    return [architecture.embedding(model), architecture.head(model)]


def _check_ties(out: dict[str, Tensor], model: nn.Module, path: Path) -> None:
    """A tensor that two layers share must be trained at both ends, to the same values."""
    for group in architecture.tied(model):
        given = [n for n in group if n in out]
        if given and (len(given) < len(group) or not all(torch.equal(out[n], out[given[0]]) for n in given)):
            raise UserError(
                f"{path} trains {given[0]} apart from {next(n for n in group if n != given[0])}, which share one "
                "tensor in this model; call veneer.untie(model) before loading"
            )


def _repeats(out: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {n for group in architecture.tied(model) for n in [g for g in group if g in out][1:]}


def _new_head(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a task head, which train with every adapter whether the file holds them or not."""
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    head = architecture.head(model)
    if head is None or embeddings is not None or not hasattr(model, "config"):
        return []
    own = {id(p) for p in head.parameters()}
    return [(n, p) for n, p in model.named_parameters() if id(p) in own and ".veneer." not in f".{n}"]


def _parts(config: Config, model: nn.Module, whole: dict[str, Site]) -> dict[str, list[Site]]:
    """The sites that stand for each module: itself, or the row ranges of a fused projection."""
    parts: dict[str, list[Site]] = {path: [] for path in whole}
    for site in all_sites(model):
        if site.module_path in parts:
            parts[site.module_path].append(site)
    for path, sites in parts.items():
        if not sites:
            raise UserError(f"{path} is a {type(whole[path].module).__name__}, which cannot be adapted here")
        if len(sites) > 1 and any(lie(name, config.method.name).whole for name in config.map.keys.values()):
            parts[path] = [whole[path]]
    return parts


def _site_state(
    config: Config,
    own: dict[str, Tensor],
    site: Site,
    parts: list[Site],
    start: tuple[Tensor, Tensor] | None,
    path: Path,
) -> dict[str, Tensor]:
    """The state of one module's sites: slots, scale, and what its start moved out of the base."""
    rank = config.rank(site.path) if "rank" in config.map.fields else 0
    keys = {slot: name for slot, name in config.map.keys.items() if name in own}
    dense = {slot: to_dense(site, name, own[name], rank, path) for slot, name in keys.items()}
    rows = {
        slot: None if config.feeds_forward(site.path) else lie(name, config.method.name).rows
        for slot, name in keys.items()
    }
    state: dict[str, Tensor] = {}
    for part in parts:
        for slot, t in dense.items():
            at = rows[slot]
            cut = part.rows is not None and at is not None
            state[f"{part.path}.{slot}"] = t.narrow(at, part.rows.start, part.out_features) if cut else t
        if "alpha" in config.map.fields:
            state[f"{part.path}.scale"] = torch.tensor(config.scale(site.path), dtype=torch.float64)
        if start is not None:
            own_rows = slice(None) if part.rows is None else part.rows
            state[f"{part.path}.offset.A"], state[f"{part.path}.offset.B"] = start[0], start[1][own_rows]
            state[f"{part.path}.offset.scale"] = torch.tensor(-config.scale(site.path), dtype=torch.float64)
    return state


def _description(
    config: Config, content: Content, parts: dict[str, list[Site]], trained: list[str], model: nn.Module
) -> dict[str, Any]:
    """What our own file would say of this adapter."""
    known = fields_of(config.method.cls)
    given = {o: config.raw[t] for o, t in config.map.fields.items() if o in known and config.raw.get(t) is not None}
    given |= {k: config.field(k) for k in given.keys() & {"rank", "alpha"}}
    given = {k: v for k, v in given.items() if k != "alpha" or v > 0}
    given |= _read_from_tensors(config, content, given)
    inner = ", ".join(f"{k}={v!r}" for k, v in sorted(given.items()))
    own = {path: {k: config.field(k, path) for k in given.keys() & {"rank", "alpha"}} for path in parts}
    own = {path: {k: v for k, v in f.items() if v != given[k] and v > 0} for path, f in own.items()}
    fields = {site.path: own[path] for path, sites in parts.items() for site in sites if own[path]}
    paths = [site.path for sites in parts.values() for site in sites]
    return {
        "recipe": f"{config.method.name}({inner}){_hook(config)}",
        "seed": 0,
        "select": list(dict.fromkeys(path.rpartition(".")[2] for path in parts)),
        "sites": paths,
        "fields": fields,
        "train": trained,
        "phase": 0,
        "base": base_fingerprint(model, without=trained),
    }


def _read_from_tensors(config: Config, content: Content, given: dict[str, Any]) -> dict[str, Any]:
    """Fields that the tensors tell better than the config's: paths for expressions, and what PEFT makes of a number."""
    if "feedforward" in given:
        return {"feedforward": tuple(path for path in content.sites if config.feeds_forward(path))}
    if "factors" in given:  # without its CUDA kernel PEFT's BOFT makes one factor whatever is asked for
        counts = {len(own["boft_R"]) for own in content.sites.values()}
        return {"factors": counts.pop()} if len(counts) == 1 else {}
    return {}


def _hook(config: Config) -> str:
    """What of a variant's config is a hook's with us."""
    kasa = config.raw.get("kasa_config")
    if kasa is None:
        return ""
    inner = ", ".join(f"{k}={float(kasa[k])!r}" for k in ("beta", "gamma") if k in kasa)
    return f"+kasa-regulariser({inner})"
