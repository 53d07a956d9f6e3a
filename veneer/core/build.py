"""Building an adapter: its places, its hooks, the converted base, its deltas, hung on the model."""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.core.adapter import Adapter, Shared, root_of
from veneer.core.delta import Delta, Written
from veneer.core.hook import Hook, Init, Optim, Plan, Schedule
from veneer.core.recipe import Part, Recipe
from veneer.core.site import Site, find_sites, inner_sites, parameter_site, stored
from veneer.errors import UserError
from veneer.fields import fields_of
from veneer.models.fingerprint import digests
from veneer.numerics import chance


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
        form = recipe.part("delta") if part.method.axis == "mixture" else None
        chosen += [s for s in found if form is None or cls.takes(s) or s.kind in form.method.cls.layers]
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
        owners = [h.name for h in hooks if brings(h, what)]
        if len(owners) > 1:
            raise UserError(f"{owners[0]} and {owners[1]} both bring their own {what}; a recipe holds one ({recipe})")
    return hooks


def brings(hook: Hook, what: str) -> bool:
    own = getattr(type(hook), what, None)
    return own is not None and own is not getattr(Optim, what, None)


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
    """Convert the base, build the deltas to the plan and hang them.

    When this raises the model is as it was, but for a base that was converted already: its dense weights are not kept.
    """
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
    root.adapters[name] = adapter
    root.switch.change(names=(*root.switch.names, name))
    if len(root.adapters) == 1:
        model.requires_grad_(False)
    try:
        _convert(adapter)
        pools = _shared(adapter)
        for site in kept:
            adapter.hang(site.path, _delta(adapter, site, plan.get(site.path) or {}, pools))
        for path in (t for t in tensors if t not in adapter.deltas):
            adapter.hang(path, Written(parameter_site(model, path), seed=seed, adapter=name), trained=True)
    except Exception:
        adapter.remove()
        raise
    product = next((h.product for h in hooks if brings(h, "product")), None)
    for d in adapter.members() if product is not None else ():
        d.product = product
    return adapter


def _convert(adapter: Adapter) -> None:
    """Put the base into the recipe's storage; a start may look at W before, or write what shall be stored."""
    for part in adapter.recipe.on("base"):
        storage = part.method.cls(**part.fields)
        for site in storage.places([s for s in find_sites(adapter.model, "linear") if not stored(s.module)]):
            site.module.__dict__.setdefault("_veneer_digests", digests(site.module))
            for h in (h for h in adapter.hooks if isinstance(h, Init)):
                h.before_conversion(site, storage)
            storage.convert(site)


def _delta(adapter: Adapter, site: Site, overrides: dict[str, Any], pools: dict[str, nn.Module]) -> Delta:
    """The delta at one site: of the mixture or side that takes it, else of the recipe's form."""
    form = adapter.recipe.part("delta")
    special = [p for p in (adapter.recipe.part("mixture"), adapter.recipe.part("side")) if p is not None]
    part = next((p for p in special if p.method.cls.takes(site)), form)

    def make(p: Part, seed: int, at: Site, fields: dict[str, Any]) -> Delta:
        return p.method.cls(at, seed=seed, adapter=adapter.name, pool=pools.get(p.method.name), **(p.fields | fields))

    delta = make(part, adapter.seed, site, overrides)
    if hasattr(delta, "compose"):

        def expert(index: int, at: Site = site) -> Delta:
            return make(form, chance.derived_seed(adapter.seed, "expert", index), at, {})

        delta.compose(expert, adapter)
    return delta


def _shared(adapter: Adapter) -> dict[str, nn.Module]:
    """Build what the sites of one method share and register it at the root."""
    parts = [p for p in (adapter.recipe.part(a) for a in ("delta", "mixture", "side")) if p is not None]
    found = {}
    for p in parts:
        sites = inner_sites(adapter.sites) if p.method.axis == "delta" else adapter.sites
        pool = p.method.cls.shared(adapter.model, sites, all_fields(p), adapter.seed)
        found |= {} if pool is None else {p.method.name: pool}
    if len(found) > 1:
        raise UserError(f"{' and '.join(found)} each share tensors between sites; a recipe holds one such method")
    for pool in found.values():
        adapter.shared = pool
        if "veneer_shared" not in adapter.model._modules:
            adapter.model.veneer_shared = Shared()
        adapter.model.veneer_shared[adapter.name] = pool
    return found
