"""What trains in a run: groups and phases, tensors that come, go and change shape, the state of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.delta import Delta
from veneer.core.hook import Plan


def optimizer_groups(adapter: Adapter) -> list[dict[str, Any]]:
    """Parameter groups: the recipe's own, then one with every trained tensor that these leave out.

    A group has ``params``, ``names``, ``rate`` (a factor on the run's rate) and ``start_step`` (its clock's zero).
    """
    groups = [g for h in adapter.hooks if hasattr(h, "groups") for g in (h.groups(adapter) or [])]
    taken = {id(p) for g in groups for p in g["params"]}
    rest = [(n, p) for n, p in adapter.named_parameters() if id(p) not in taken]
    if rest:
        groups.append({"params": [p for _, p in rest], "names": [n for n, _ in rest]})
    for g in groups:
        g.setdefault("rate", 1.0)
        g.setdefault("start_step", 0)
    return groups


def add_parameters(adapter: Adapter, params: dict[str, nn.Parameter], start_step: int = 0, **settings: Any) -> None:
    """Let new tensors train in the run under way, as a group of their own with its own clock."""
    if adapter.optimizer is None or not params:
        return
    first = adapter.optimizer.param_groups[0]
    group = {k: v for k, v in first.items() if k not in ("params", "names")}
    group |= {"start_step": start_step, "names": list(params), "params": list(params.values())} | settings
    adapter.optimizer.add_param_group(group)


def replace_parameter(
    adapter: Adapter, delta: Delta, name: str, value: Tensor, keep: Iterable[int] | None = None, dim: int = 0
) -> nn.Parameter:
    """Put a tensor of another shape in a slot and carry the optimiser's state along.

    ``keep`` are the indices along ``dim`` that survive (None: all, in place); the state of new ones starts at zero.
    """
    old = getattr(delta, name)
    delta.set_tensor(name, value, trained=True)
    new = getattr(delta, name)
    new.requires_grad_(old.requires_grad)
    if adapter.optimizer is None:
        return new
    for group in adapter.optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = adapter.optimizer.state.pop(old, None)
    if state is not None:
        adapter.optimizer.state[new] = {k: _carried(v, old, new, keep, dim) for k, v in state.items()}
    return new


def remove_parameters(adapter: Adapter, params: Iterable[nn.Parameter]) -> None:
    """Stop training tensors: out of the optimiser's groups and state."""
    if adapter.optimizer is None:
        return
    gone = {id(p) for p in params}
    for group in adapter.optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    for p in [p for p in adapter.optimizer.state if id(p) in gone]:
        del adapter.optimizer.state[p]


def advance(adapter: Adapter) -> bool:
    """End the phase under way and take the next; False when it was the last."""
    phase = adapter.phases[adapter.phase]
    for hook in adapter.hooks:
        plan = hook.on_phase_end(phase)
        if plan is not None:
            rebuild(adapter, plan)
    if adapter.phase + 1 >= len(adapter.phases):
        return False
    adapter.phase += 1
    adapter.start_phase()
    return True


def rebuild(adapter: Adapter, plan: Plan) -> None:
    """Build the deltas at the planned sites anew with other fields; a site planned None is dropped."""
    for path, fields in plan.items():
        old = adapter.deltas[path]
        adapter.drop(old)
        if fields is None:
            del adapter.deltas[path]
            continue
        own = old.field_values() | fields
        new = type(old)(old.site, seed=adapter.seed, adapter=adapter.name, pool=old.pool, **own)
        new.product = old.product
        adapter.hang(path, new)
    adapter.plan = adapter.plan | plan
    adapter.sites = [s for s in adapter.sites if s.path in adapter.deltas]


def training_state(adapter: Adapter) -> dict[str, Any]:
    """What a resumed run needs besides ``state`` and the optimiser: phase, draws and the hooks' states."""
    hooks = {h.name: h.state_dict() for h in adapter.hooks}
    return {"phase": adapter.phase, "draws": adapter.root.draws, "hooks": hooks}


def load_training_state(adapter: Adapter, state: dict[str, Any]) -> None:
    """Take over what ``training_state`` gave."""
    adapter.phase, adapter.root.draws = state["phase"], state["draws"]
    for hook in adapter.hooks:
        hook.load_state_dict(state["hooks"].get(hook.name, {}))


def _carried(value: Any, old: Tensor, new: Tensor, keep: Iterable[int] | None, dim: int) -> Any:
    """An optimiser's tensor of the old shape, cut to what was kept and padded with zeros."""
    if not isinstance(value, Tensor) or value.shape != old.shape:
        return value
    at = None if keep is None else torch.as_tensor(list(keep), device=value.device)
    kept = value if at is None else value.index_select(dim, at)
    out = value.new_zeros(new.shape)
    out.narrow(dim, 0, kept.shape[dim]).copy_(kept)
    return out
