"""Building an adapter again from what its file says."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from veneer.core import build as core
from veneer.core import recipe as recipes
from veneer.core.adapter import Adapter
from veneer.core.site import find_sites, site_at
from veneer.errors import UserError, nearest
from veneer.models.fingerprint import base_fingerprint
from veneer.parts.attach import trained_tensors
from veneer.parts.state import load_state


def attach_from(
    model: nn.Module,
    description: dict[str, Any],
    state: dict[str, Tensor],
    *,
    name: str = "default",
    force: bool = False,
) -> Adapter:
    """Attach what ``description`` and ``state`` hold: no evidence and no starts, then the saved tensors.

    Raises UserError when the base is another one (unless ``force``) or a site of the file is not in the model.
    """
    parsed = recipes.parse(description["recipe"])
    core.check_name(model, name)
    held = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    lost = next((t for t in description["train"] if t not in held), None)
    if lost is not None:
        task = f" for the task {description['task']!r}" if "task" in description else ""
        raise UserError(f"the adapter trained {lost}, which this model lacks: load the base{task} that it was made on")
    tensors = trained_tensors(model, description["train"])
    base = base_fingerprint(model, without=tensors)
    named = base_fingerprint(model, without=description["train"])  # a head that the file does not hold is the base's
    if description["base"] not in (base, named) and not force:
        raise UserError(
            f"this adapter was made on another base (its fingerprint is {description['base'][:8]}…, "
            f"this model's {base[:8]}…); load it on that base, or with force=True if you are sure"
        )
    found = find_sites(model, description["select"])
    modules = dict(model.named_modules())
    rest = [p for p in description["sites"] if p in modules and p not in {s.path for s in found}]
    whole = [site_at(model, p) for p in rest]  # fused projections that a file adapts as one layer
    found += [s for s in whole if s.kind in ("linear", "conv", "embedding")]
    by_path = {s.path: s for s in core.places(model, parsed, found)}
    lost = [p for p in description["sites"] if p not in by_path]
    if lost:
        raise UserError(f"the adapter has a site {lost[0]!r} that this model lacks{nearest(lost[0], by_path)}")
    hooks = core.make_hooks(parsed, description["seed"])
    adapter = core.build(
        model,
        parsed,
        [by_path[p] for p in description["sites"]],
        hooks,
        plan=description["fields"],
        tensors=tensors,
        name=name,
        seed=description["seed"],
        base=base,
        select=description["select"],
    )
    try:
        adapter.phase = description["phase"]
        core.announce(adapter, None)
        load_state(adapter, state)
    except Exception:
        adapter.remove()
        raise
    adapter.start_phase()
    return adapter
