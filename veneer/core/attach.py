"""Attaching: from a recipe and a selection of sites to an adapter on a model, in one fixed order.

Sites; evidence, on the model as given; the plan of ranks; conversion of the base; deltas built to the plan; starts;
settle; on_attach.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

from torch import nn

from veneer.core import recipe as recipes
from veneer.core.adapter import Adapter, root_of
from veneer.core.delta import Delta, Written
from veneer.core.evidence import Evidence, gather
from veneer.core.hook import Hook, Init, Optim, Plan, Schedule
from veneer.core.recipe import Part, Recipe
from veneer.core.site import Select, Site, find_sites, parameter_site, stored
from veneer.errors import UserError, nearest
from veneer.fields import fields_of
from veneer.models import architecture
from veneer.models.fingerprint import base_fingerprint, digests
from veneer.numerics import chance


def attach(
    model: nn.Module,
    recipe: str | Recipe = "lora",
    *,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    sites: Select = "linear",
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
        sites: what to adapt, see ``find_sites``.
        calibration: batches that the model accepts, for recipes that need evidence.
        seed: of everything the methods draw.
        name: of this adapter on this model.
        train: names or globs of base tensors that train as they are (heads, norms); a new task head always does.
        keep_base: False drops weights that a replacing form stands for; ``disabled`` and ``detach`` then refuse.
        schedule: for methods that must know the run's length before it starts.

    Raises:
        UserError: for a recipe, selection, field or name that does not fit; the model is then as it was.
    """
    parsed = recipes.parse(recipe, rank=rank, alpha=alpha, dropout=dropout)
    check_name(model, name)
    chosen = places(model, parsed, find_sites(model, sites))
    hooks = make_hooks(parsed, seed)
    batches = _calibration(hooks, calibration)
    tensors = trained_tensors(model, train)
    base = base_fingerprint(model)
    form = all_fields(parsed.part("delta")) if parsed.part("delta") else {}
    evidence = _evidence(model, chosen, hooks, batches, form, seed)
    planner = next((h for axis in ("ranks", "init") for h in hooks if h.axis == axis and hasattr(h, "plan")), None)
    plan = planner.plan(chosen, evidence, form) if planner is not None else None
    select = sites if isinstance(sites, str) else [s.path for s in chosen] if callable(sites) else list(sites)
    adapter = build(
        model, parsed, chosen, hooks, plan=plan or {}, tensors=tensors, name=name, seed=seed, base=base, select=select
    )
    try:
        if not keep_base and not any(d.replaces for d in adapter.deltas.values()):
            raise UserError(f"keep_base=False: nothing in {parsed} stands for W; leave it True")
        _start(adapter, evidence)
        for h in hooks:
            if _settles(h):
                h.settle(adapter, batches)
        announce(adapter, schedule)
    except Exception:
        adapter.remove()
        raise
    if not keep_base:
        _drop_base(adapter)
    adapter.start_phase()
    return adapter


def announce(adapter: Adapter, schedule: Schedule | None) -> None:
    """Tell every hook that the adapter stands."""
    for part in adapter.recipe.on("optim"):
        if "pair" in part.method.wants and not any(adapter.pairs()):
            raise UserError(f"{part.method.name} moves trained factors in pairs; {adapter.recipe} has none")
    for h in adapter.hooks:
        h.schedule = schedule
        h.on_attach(adapter)


def check_name(model: nn.Module, name: str) -> None:
    """Refuse a name that is taken, empty or would not do in a path."""
    taken = model.__dict__["_veneer"].adapters if "_veneer" in model.__dict__ else {}
    if name in taken:
        raise UserError(f"the model already has an adapter called {name!r}; give another name or detach it first")
    if not name or set(name) & set(".:/\\"):
        raise UserError(f"an adapter's name must not be empty or hold any of . : / \\, not {name!r}")


def places(model: nn.Module, recipe: Recipe, sites: list[Site]) -> list[Site]:
    """The sites of the recipe's form (or mixture) and side among those selected."""
    chosen: list[Site] = []
    for part in (recipe.part("mixture") or recipe.part("delta"), recipe.part("side")):
        if part is None:
            continue
        cls = part.method.cls
        found = cls.places(model, sites, all_fields(part))
        if not found:
            raise UserError(
                f"{part.method.name} has no place among the selected sites: it takes {', '.join(cls.layers)}, "
                f"and the selection holds {', '.join(sorted({s.kind for s in sites}))}"
            )
        chosen += found
    return chosen


def all_fields(part: Part) -> dict[str, Any]:
    """The fields of a part, defaults included."""
    return {n: f.default for n, f in fields_of(part.method.cls).items()} | part.fields


def make_hooks(recipe: Recipe, seed: int) -> list[Hook]:
    """The recipe's hooks; refuses two that each bring their own optimiser, product or step."""
    hooks = [p.method.cls(**p.fields) for axis in ("init", "ranks", "optim", "objective") for p in recipe.on(axis)]
    for h in hooks:
        h.seed = h.seed or seed
    for what in ("optimizer", "micro_step", "product"):
        owners = [h.name for h in hooks if _brings(h, what)]
        if len(owners) > 1:
            raise UserError(f"{owners[0]} and {owners[1]} both bring their own {what}; a recipe holds one")
    return hooks


def _brings(hook: Hook, what: str) -> bool:
    own = getattr(type(hook), what, None)
    return own is not None and own is not getattr(Optim, what, None)


def _settles(hook: Hook) -> bool:
    return isinstance(hook, Init) and type(hook).settle is not Init.settle


def _calibration(hooks: list[Hook], batches: Iterable[Any] | None) -> list[Any]:
    wants = [h.name for h in hooks if getattr(h, "needs", None) or _settles(h)]
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
    return gather(model, sites, batches, needs, components=components, labels_only=labels_only, seed=seed)


def trained_tensors(model: nn.Module, train: str | Iterable[str]) -> list[str]:
    """The names of base tensors that train as they are: those that ``train`` names and a new task head's."""
    names = [n for n, _ in model.named_parameters(remove_duplicate=False) if ".veneer." not in f".{n}"]
    chosen: list[str] = []
    for pattern in [train] if isinstance(train, str) else train:
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


def build(
    model: nn.Module,
    recipe: Recipe,
    sites: list[Site],
    hooks: list[Hook],
    *,
    plan: Plan,
    tensors: list[str],
    name: str,
    seed: int,
    base: str,
    select: Any,
) -> Adapter:
    """Convert the base, build the deltas to the plan and hang them; the model is as it was when this raises."""
    kept = [s for s in sites if plan.get(s.path, {}) is not None]
    if not kept:
        raise UserError("the plan leaves no site; give a larger rank or another selection")
    for i, s in enumerate(kept):
        s.index = i
    root = root_of(model)
    adapter = Adapter.built(model, recipe, name=name, seed=seed, base=base, select=select)
    adapter.flags = {n: p.requires_grad for n, p in model.named_parameters()}
    adapter.hooks, adapter.plan, adapter.sites = hooks, plan, kept
    for h in hooks:
        h.adapter = adapter
    for part in recipe.on("base"):
        storage = part.method.cls(**part.fields)
        for site in storage.places([s for s in find_sites(model, "linear") if not stored(s.module)]):
            site.module.__dict__.setdefault("_veneer_digests", digests(site.module))
            for h in (h for h in hooks if isinstance(h, Init)):
                h.before_conversion(site, storage)
            storage.convert(site)
    root.adapters[name] = adapter
    root.switch.change(names=(*root.switch.names, name))
    if len(root.adapters) == 1:
        model.requires_grad_(False)
    try:
        pools = _shared(adapter)
        for site in kept:
            adapter.hang(site.path, _delta(adapter, site, plan.get(site.path) or {}, pools))
        for path in (t for t in tensors if t not in adapter.deltas):
            adapter.hang(path, Written(parameter_site(model, path), seed=seed, adapter=name), trained=True)
    except Exception:
        adapter.remove()
        raise
    product = next((h.product for h in hooks if _brings(h, "product")), None)
    for d in adapter.deltas.values() if product is not None else ():
        d.product = product
    return adapter


def _delta(adapter: Adapter, site: Site, overrides: dict[str, Any], pools: dict[str, nn.Module]) -> Delta:
    """The delta at one site: of the mixture or side that takes it, else of the recipe's form."""
    form = adapter.recipe.part("delta")
    special = [p for p in (adapter.recipe.part("mixture"), adapter.recipe.part("side")) if p is not None]
    part = next((p for p in special if p.method.cls.takes(site)), form)

    def make(p: Part = form, *purpose: Any, **fields: Any) -> Delta:
        own = chance.derived_seed(adapter.seed, *purpose) if purpose else adapter.seed
        pool = pools.get(p.method.name)
        return p.method.cls(site, seed=own, adapter=adapter.name, pool=pool, **(p.fields | fields))

    delta = make(part, **overrides)
    if hasattr(delta, "compose"):
        delta.compose(lambda index: make(form, "expert", index), adapter)
    return delta


def _shared(adapter: Adapter) -> dict[str, nn.Module]:
    """Build what the sites of one method share and register it at the root."""
    parts = [p for p in (adapter.recipe.part(a) for a in ("delta", "mixture", "side")) if p is not None]
    found = {
        p.method.name: p.method.cls.shared(adapter.model, adapter.sites, all_fields(p), adapter.seed) for p in parts
    }
    found = {n: pool for n, pool in found.items() if pool is not None}
    if len(found) > 1:
        raise UserError(f"{' and '.join(found)} each share tensors between sites; a recipe holds one such method")
    for pool in found.values():
        adapter.shared = pool
        if "veneer_shared" not in adapter.model._modules:
            adapter.model.veneer_shared = nn.ModuleDict()
        adapter.model.veneer_shared[adapter.name] = pool
    return found


def _start(adapter: Adapter, evidence: Evidence | None) -> None:
    init = next((h for h in adapter.hooks if isinstance(h, Init)), None)
    for delta in adapter.deltas.values() if init is not None else ():
        slots = list(delta.slots())
        start = init.start(delta.site, slots, evidence, chance.generator(init.seed, delta.site.path, init.name))
        extra = sorted(set(start) - {s.role for s in slots})
        if extra:
            has = ", ".join(s.role for s in slots) or "none"
            raise UserError(f"{init.name} starts {extra[0]}, which {delta.name} does not have (it has: {has})")
        delta.fill(start)
        if init.offset and start:
            delta.freeze_offset()


def _drop_base(adapter: Adapter) -> None:
    adapter.keep_base = False
    for d in adapter.deltas.values():
        p = d.site.module._parameters.get("weight")
        if d.replaces and p is not None:
            p.data = p.data.new_empty(0)
