"""Attaching: from a recipe and a selection of sites to an adapter on a model, in one fixed order.

Sites; evidence, on the model as given; the plan of ranks; conversion of the base; deltas built to the plan; starts;
settle; on_attach; swap.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from veneer.core import chance
from veneer.core import recipe as recipes
from veneer.core.adapter import Adapter, base_fingerprint, root_of
from veneer.core.delta import Delta, Written
from veneer.core.evidence import Evidence, gather
from veneer.core.hook import Hook, Init, Schedule
from veneer.core.recipe import Part, Recipe
from veneer.core.site import Select, Site, find_sites, parameter_site, stored
from veneer.errors import UserError, nearest
from veneer.models import architecture

HOOKED = ("init", "ranks", "optim", "objective")


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
    train: Iterable[str] = (),
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
        UserError: for a recipe, selection, field or name that does not fit, before anything is changed.
    """
    parsed = recipes.parse(recipe, rank=rank, alpha=alpha, dropout=dropout)
    _check_name(model, name)
    chosen = _places(model, parsed, find_sites(model, sites))
    hooks = _hooks(parsed, seed)
    needs = frozenset(n for h in hooks for n in getattr(h, "needs", ()))
    batches = _calibration(parsed, hooks, needs, calibration)
    base = base_fingerprint(model)
    tensors = _tensors(model, train)
    evidence = _gather(model, chosen, hooks, needs, batches, seed)
    planner = next((h for axis in ("ranks", "init") for h in hooks if h.axis == axis and hasattr(h, "plan")), None)
    plan = planner.plan(chosen, evidence, _delta_fields(parsed)) if planner is not None else None
    select = sites if isinstance(sites, str) else [s if isinstance(s, str) else s.path for s in _names(sites, chosen)]
    adapter = _build(model, parsed, chosen, hooks, plan or {}, tensors, name, seed, base, select, keep_base)
    try:
        _start(adapter, evidence)
        for h in hooks:
            if isinstance(h, Init) and type(h).settle is not Init.settle:
                h.settle(adapter, batches)
        for h in hooks:
            h.schedule = schedule
            h.on_attach(adapter)
    except Exception:
        adapter._remove(restore=True)
        raise
    _drop_replaced(adapter)
    adapter.start_phase()
    return adapter


def attach_from(
    model: nn.Module,
    description: dict[str, Any],
    state: dict[str, Tensor],
    *,
    name: str = "default",
    force: bool = False,
) -> Adapter:
    """Rebuild an adapter from what its file says: no evidence, no starts, then the saved tensors.

    Raises UserError when the base is another one (unless ``force``) or a site of the file is not in the model.
    """
    parsed = recipes.parse(description["recipe"])
    _check_name(model, name)
    base = base_fingerprint(model)
    if base != description["base"] and not force:
        raise UserError(
            f"this adapter was made on another base (its fingerprint is {description['base'][:8]}…, "
            f"this model's {base[:8]}…); load it on that base, or with force=True if you are sure"
        )
    chosen = _places(model, parsed, find_sites(model, description["select"]))
    by_path = {s.path: s for s in chosen}
    lost = [p for p in description["sites"] if p not in by_path]
    if lost:
        raise UserError(f"the adapter has a site {lost[0]!r} that this model lacks{nearest(lost[0], by_path)}")
    chosen = [by_path[p] for p in description["sites"]]
    hooks = _hooks(parsed, description["seed"])
    adapter = _build(
        model, parsed, chosen, hooks, description["fields"], _tensors(model, description["train"]),
        name, description["seed"], base, description["select"], True,
    )  # fmt: skip
    try:
        adapter.phase = description.get("phase", 0)
        for h in hooks:
            h.schedule = None
            h.on_attach(adapter)
        adapter.load_state(state)
    except Exception:
        adapter._remove(restore=True)
        raise
    adapter.start_phase()
    return adapter


def _check_name(model: nn.Module, name: str) -> None:
    taken = model.__dict__["_veneer"].adapters if "_veneer" in model.__dict__ else {}
    if name in taken:
        raise UserError(f"the model already has an adapter called {name!r}; give another name or detach it first")
    if not name or set(name) & set(".:/\\"):
        raise UserError(f"an adapter's name must not be empty or hold any of . : / \\, not {name!r}")


def _places(model: nn.Module, recipe: Recipe, sites: list[Site]) -> list[Site]:
    """The sites of the recipe's form, mixture and side among those selected; numbered in order."""
    chosen: list[Site] = []
    mixture = recipe.part("mixture")
    parts = [p for p in (mixture or recipe.part("delta"), recipe.part("side")) if p is not None]
    for part in parts:
        fields = part.method.cls.checked({}) | _all_fields(part)
        found = part.method.cls.places(model, sites, fields)
        if not found:
            kinds = sorted({s.kind for s in sites})
            raise UserError(
                f"{part.method.name} has no place among the selected sites (it takes {', '.join(part.method.cls.layers)}; "
                f"the selection holds {', '.join(kinds)})"
            )
        chosen += found
    for i, s in enumerate(chosen):
        s.index = i
    return chosen


def _all_fields(part: Part) -> dict[str, Any]:
    from veneer.core.fields import fields_of

    return {n: f.default for n, f in fields_of(part.method.cls).items()} | part.fields


def _delta_fields(recipe: Recipe) -> dict[str, Any]:
    part = recipe.part("delta")
    return {} if part is None else _all_fields(part)


def _hooks(recipe: Recipe, seed: int) -> list[Hook]:
    hooks = []
    for axis in HOOKED:
        for part in recipe.on(axis):
            hook = part.method.cls(**part.fields)
            hook.seed = getattr(hook, "seed", None) or seed
            hooks.append(hook)
    for what in ("optimizer", "micro_step", "product"):
        owners = [h for h in hooks if _defines(h, what)]
        if len(owners) > 1:
            raise UserError(f"{owners[0].name} and {owners[1].name} both bring their own {what}; a recipe holds one")
    return hooks


def _defines(hook: Hook, what: str) -> bool:
    from veneer.core.hook import Optim

    own = getattr(type(hook), what, None)
    return own is not None and own is not getattr(Optim, what, None)


def _calibration(recipe: Recipe, hooks: list[Hook], needs: frozenset[str], batches: Iterable[Any] | None) -> list[Any]:
    settles = any(isinstance(h, Init) and type(h).settle is not Init.settle for h in hooks)
    if not (needs or settles):
        return []
    if batches is None:
        who = next(h.name for h in hooks if getattr(h, "needs", None) or isinstance(h, Init))
        raise UserError(f"{who} looks at data before it starts: give attach calibration=<a few batches>")
    return list(batches)


def _gather(
    model: nn.Module, sites: list[Site], hooks: list[Hook], needs: frozenset[str], batches: list[Any], seed: int
) -> Evidence | None:
    if not needs:
        return None
    components = max([int(getattr(h, "components_wanted", lambda: 16)()) for h in hooks if getattr(h, "needs", None)])
    labels_only = any(getattr(h, "labels_only", False) for h in hooks)
    return gather(model, sites, batches, needs, components=components, labels_only=labels_only, seed=seed)


def _tensors(model: nn.Module, train: Iterable[str]) -> list[str]:
    """The names of base tensors that train as they are: those that ``train`` names and a task head's."""
    import fnmatch

    names = [n for n, _ in model.named_parameters(remove_duplicate=False) if ".veneer." not in f".{n}"]
    chosen: list[str] = []
    for pattern in [train] if isinstance(train, str) else train:
        hits = [n for n in names if fnmatch.fnmatch(n, pattern) or f".{n}".find(f".{pattern}.") >= 0 or n == pattern]
        if not hits:
            raise UserError(f"train={pattern!r} matches no tensor of the model{nearest(pattern, names)}")
        chosen += hits
    head = architecture.head(model)
    if head is not None and _new_head(model):
        own = {id(p) for p in head.parameters()}
        chosen += [n for n, p in model.named_parameters() if id(p) in own]
    return list(dict.fromkeys(chosen))


def _names(sites: Select, chosen: list[Site]) -> list[Any]:
    return list(sites) if not callable(sites) else list(chosen)


def _build(
    model: nn.Module,
    recipe: Recipe,
    sites: list[Site],
    hooks: list[Hook],
    plan: dict[str, Any],
    tensors: list[str],
    name: str,
    seed: int,
    base: str,
    select: Any,
    keep_base: bool,
) -> Adapter:
    root = root_of(model)
    adapter = Adapter.built(model, recipe, name=name, seed=seed, base=base, select=select)
    adapter.flags = {n: p.requires_grad for n, p in model.named_parameters()}
    adapter.hooks, adapter.keep_base, adapter.plan = hooks, keep_base, plan
    for h in hooks:
        h.adapter = adapter
    adapter.sites = [s for s in sites if plan.get(s.path, {}) is not None]
    if not adapter.sites:
        raise UserError("the plan leaves no site; give a larger rank or another selection")
    for part in recipe.on("base"):
        storage = part.method.cls(**part.fields)
        for site in storage.places([s for s in find_sites(model, "linear") if not stored(s.module)]):
            storage.convert(site)
    form, mixture, side = recipe.part("delta"), recipe.part("mixture"), recipe.part("side")
    pools = {
        p.method.name: p.method.cls.shared(adapter.sites, _all_fields(p), seed) for p in (form, mixture, side) if p
    }
    _register_shared(adapter, pools)
    if not root.adapters:
        model.requires_grad_(False)
    root.adapters[name] = adapter
    root.switch.change(names=(*root.switch.names, name))
    for site in adapter.sites:
        part = _part_at(site, form, mixture, side)
        adapter.deltas[site.path] = _delta(adapter, site, part, plan.get(site.path) or {}, pools, form)
    for path in tensors:
        d = Written(parameter_site(model, path), seed=seed, adapter=name)
        adapter.trained[path] = d
    for d in adapter.every().values():
        if isinstance(d, Written):
            d.take()
        d.train(d.site.module.training)
        adapter.hang(d)
    for h in hooks:
        if _defines(h, "product"):
            for d in adapter.deltas.values():
                d.product = h.product
    return adapter


def _part_at(site: Site, form: Part | None, mixture: Part | None, side: Part | None) -> Part:
    for part in (mixture, side):
        if part is not None and part.method.cls.takes(site):
            return part
    assert form is not None
    return form


def _delta(
    adapter: Adapter, site: Site, part: Part, overrides: dict[str, Any], pools: dict[str, Any], form: Part | None
) -> Delta:
    fields = part.fields | overrides
    pool = pools.get(part.method.name)
    delta = part.method.cls(site, seed=adapter.seed, adapter=adapter.name, pool=pool, **fields)
    if hasattr(delta, "compose"):

        def make(index: int = 0, at: Site = site) -> Delta:
            seed = chance.derived_seed(adapter.seed, "expert", index)
            inner = form.method.cls
            return inner(at, seed=seed, adapter=adapter.name, pool=pools.get(form.method.name), **form.fields)

        delta.compose(make)
    return delta


def _register_shared(adapter: Adapter, pools: dict[str, nn.Module | None]) -> None:
    found = {n: p for n, p in pools.items() if p is not None}
    if not found:
        return
    if len(found) > 1:
        raise UserError(f"{' and '.join(found)} each share tensors between sites; a recipe holds one such method")
    adapter.shared = next(iter(found.values()))
    model = adapter.model
    if "veneer_shared" not in model._modules:
        model.veneer_shared = nn.ModuleDict()
    model.veneer_shared[adapter.name] = adapter.shared


def _start(adapter: Adapter, evidence: Evidence | None) -> None:
    init = next((h for h in adapter.hooks if isinstance(h, Init)), None)
    if init is None:
        return
    for delta in adapter.deltas.values():
        slots = list(delta.slots())
        start = init.start(delta.site, slots, evidence, chance.generator(init.seed, delta.site.path, init.name))
        extra = set(start) - {s.role for s in slots}
        if extra:
            raise UserError(
                f"{init.name} starts {', '.join(sorted(extra))}, which {delta.name} does not have "
                f"(it has {', '.join(s.role for s in slots)})"
            )
        delta.fill(start)
        if type(init).offset and start:
            delta.freeze_offset()


def _drop_replaced(adapter: Adapter) -> None:
    if adapter.keep_base:
        return
    replacing = [d for d in adapter.deltas.values() if d.replaces]
    if not replacing:
        raise UserError(f"keep_base=False: nothing in {adapter.recipe} stands for W; leave it True")
    for d in replacing:
        p = d.site.module._parameters["weight"]
        p.data = p.data.new_empty(0)


def _new_head(model: nn.Module) -> bool:
    """Whether the model's head was made for a task (a classifier), not trained with the base."""
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    return hasattr(model, "config") and embeddings is None
