"""Attaching: from a recipe and a selection of sites to an adapter on a model, in one fixed order.

Sites; evidence, on the model as given; the plan of ranks; conversion of the base; deltas built to the plan; starts;
settle; on_attach.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from veneer.core import build as core
from veneer.core import recipe as recipes
from veneer.core.adapter import Adapter
from veneer.core.delta import Written
from veneer.core.hook import Hook, Init, Ranks, Schedule
from veneer.core.recipe import Recipe
from veneer.core.site import Select, Site, find_sites, inner_sites
from veneer.errors import UserError, nearest
from veneer.models import architecture
from veneer.models.fingerprint import base_fingerprint
from veneer.numerics import chance
from veneer.parts.evidence import Evidence, gather


def attach(
    model: nn.Module,
    recipe: str | Recipe = "lora",
    *,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    sites: Select | None = None,
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
    name: str = "default",
    train: str | Iterable[str] = (),
    keep_base: bool = True,
    schedule: Schedule | None = None,
) -> Adapter:
    """Put a recipe on a model and return its Adapter; the base is frozen and otherwise as it was.

    Args:
        model: any torch module; transformers models are known by name, others by their layers.
        recipe: a sum of method names, ``"lora(rank=8)+eva+ba-lora"``.
        rank, alpha, dropout: offered to every part of the recipe that has such a field.
        sites: what to adapt, see ``find_sites``; by default every linear layer, or what a method of the recipe says is
            usual for it.
        calibration: batches that the model accepts, for recipes that need evidence.
        seed: of everything the methods draw.
        name: of this adapter on this model.
        train: names or globs of base tensors that train as they are (heads, norms); a new task head always does.
        keep_base: False drops weights that a replacing form stands for; ``disabled`` and ``detach`` then refuse.
        schedule: for methods that must know the run's length before it starts.

    Raises:
        UserError: for a recipe, selection, field or name that does not fit; the model is then as it was, but for a base
            that was converted already.
    """
    parsed = recipes.parse(recipe, rank=rank, alpha=alpha, dropout=dropout)
    core.check_name(model, name)
    usual = (p.method.cls.usual_sites for p in parsed.parts if hasattr(p.method.cls, "usual_sites"))
    sites = next(usual, "linear") if sites is None else sites
    chosen = core.places(model, parsed, find_sites(model, sites))
    hooks = core.make_hooks(parsed, seed)
    for h in hooks:
        h.schedule = schedule
    batches = _calibration(hooks, calibration)
    tensors = trained_tensors(model, [train] if isinstance(train, str) else train, *(h.trains(model) for h in hooks))
    chosen = _without_whole(chosen, tensors, parsed)
    own = {s.path for s in chosen}
    base = base_fingerprint(model, without=trained_tensors(model, [t for t in tensors if t not in own]))
    form = core.all_fields(parsed.part("delta")) if parsed.part("delta") else {}
    evidence = _evidence(model, chosen, hooks, batches, form, seed)
    for h in hooks:
        if _surveys(h):
            h.survey(model, chosen, batches)
    axis = "ranks" if parsed.part("ranks") else "init"  # beside a method that decides the ranks a start only starts
    planner = next((h for h in hooks if h.axis == axis and hasattr(h, "plan")), None)
    plan = planner.plan([s for s in chosen if s.kind != "module"], evidence, form) if planner is not None else None
    select = sites if isinstance(sites, str) else [s.path for s in chosen] if callable(sites) else list(sites)
    adapter = core.build(
        model, parsed, chosen, hooks, plan=plan or {}, tensors=tensors, name=name, seed=seed, base=base, select=select
    )
    try:
        if not keep_base and not any(d.replaces for d in adapter.deltas.values()):
            raise UserError(f"keep_base=False: nothing in {parsed} stands for W; leave it True")
        _start(adapter, evidence)
        for h in hooks:
            if _settles(h):
                h.settle(adapter, batches)
        core.announce(adapter, schedule)
    except Exception:
        adapter.remove()
        raise
    if not keep_base:
        _drop_base(adapter)
    adapter.start_phase()
    return adapter


def _without_whole(sites: list[Site], tensors: list[str], recipe: Recipe) -> list[Site]:
    """The sites without tensors that train as they are, which need no change beside: a new head is not in the base."""
    form = recipe.part("delta")
    if form is None or issubclass(form.method.cls, Written):
        return sites
    kept = [s for s in sites if s.path not in set(tensors)]
    if not kept:
        raise UserError(f"all that {recipe} would change trains as it is already: {sites[0].path}; select other layers")
    return kept


def _settles(hook: Hook) -> bool:
    return isinstance(hook, Init) and type(hook).settle is not Init.settle


def _surveys(hook: Hook) -> bool:
    return isinstance(hook, Ranks) and type(hook).survey is not Ranks.survey


def _calibration(hooks: list[Hook], batches: Iterable[Any] | None) -> list[Any]:
    wants = [h.name for h in hooks if getattr(h, "needs", None) or _settles(h) or _surveys(h)]
    if wants and batches is None:
        raise UserError(f"{wants[0]} looks at data before it starts: give attach calibration=<a few batches>")
    return list(batches) if wants else []


def _evidence(
    model: nn.Module, sites: list[Site], hooks: list[Hook], batches: list, form: dict[str, Any], seed: int
) -> Evidence | None:
    asking = [h for h in hooks if getattr(h, "needs", None)]
    if not asking:
        return None
    needs = frozenset(n for h in asking for n in h.needs)
    components = max(h.components_wanted(form) for h in asking)
    labels_only = any(getattr(h, "labels_only", False) for h in asking)
    return gather(model, inner_sites(sites), batches, needs, components=components, labels_only=labels_only, seed=seed)


def trained_tensors(model: nn.Module, *train: Iterable[str]) -> list[str]:
    """The names of base tensors that train as they are: those that ``train`` names and a new task head's."""
    names = [n for n, _ in model.named_parameters(remove_duplicate=False) if ".veneer." not in f".{n}"]
    chosen: list[str] = []
    for pattern in itertools.chain(*train):
        hits = [n for n in names if fnmatch.fnmatch(n, pattern) or f".{pattern}." in f".{n}."]
        if not hits:
            raise UserError(f"train={pattern!r} matches no tensor of the model{nearest(pattern, names)}")
        chosen += hits
    head = architecture.head(model)
    new = getattr(model, "get_output_embeddings", lambda: None)() is None and hasattr(model, "config")
    if head is not None and new:
        own = {id(p) for p in head.parameters()}
        chosen += [n for n, p in model.named_parameters() if id(p) in own and ".veneer." not in f".{n}"]
    chosen += [n for group in architecture.tied(model) if set(group) & set(chosen) for n in group]
    return list(dict.fromkeys(chosen))


def _start(adapter: Adapter, evidence: Evidence | None) -> None:
    init = next((h for h in adapter.hooks if isinstance(h, Init)), None)
    starts: dict[str, dict[str, Tensor]] = {}  # experts of one layer start alike
    for delta in adapter.members() if init is not None else ():
        slots, path = list(delta.slots()), delta.site.path
        if path not in starts:
            init.delta = delta
            starts[path] = init.start(delta.site, slots, evidence, chance.generator(init.seed, path, init.name))
        extra = sorted(set(starts[path]) - {s.role for s in slots})
        if extra:
            has = ", ".join(s.role for s in slots) or "none"
            raise UserError(f"{init.name} starts {extra[0]}, which {delta.name} does not have (it has: {has})")
        delta.fill({role: value.clone() for role, value in starts[path].items()})
        if init.offset and starts[path]:
            delta.freeze_offset()


def _drop_base(adapter: Adapter) -> None:
    adapter.keep_base = False
    for d in adapter.deltas.values():
        p = d.site.module._parameters.get("weight")
        if d.replaces and p is not None:
            p.data = p.data.new_empty(0)
