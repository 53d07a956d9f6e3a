"""An adapter's state as a value: read, write, flatten, average, run with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.delta import Delta, Offset, Pair
from veneer.errors import UserError, nearest

State = dict[str, Tensor]


def state(adapter: Adapter) -> State:
    """Everything a file must hold: trained tensors, offsets, indices, scales; nothing that a seed gives again.

    Keys are ``<site path>.<tensor>``, ``shared.<tensor>``, ``hook:<name>.<tensor>`` and ``train:<tensor>``; the values
    are the adapter's own tensors, detached.
    """
    out: State = {}
    for path, d in adapter.deltas.items():
        out |= {f"{path}.{n}": t for n, t in delta_state(d).items()}
    if adapter.shared is not None:
        out |= {f"shared.{n}": t for n, t in _saved(adapter.shared).items()}
    for hook in adapter.hooks:
        out |= {f"hook:{hook.name}.{n}": p for n, p in hook.parameters().items()}
    out |= {f"train:{path}": d.parameter() for path, d in adapter.trained.items()}
    return {k: v.detach() for k, v in _once(out)}


def delta_state(delta: Delta) -> State:
    """The saved tensors of one delta, with the numbers ``scale`` and ``offset.scale`` as fp64 scalars."""
    out = _saved(delta)
    if delta.pair() is not None:
        out["scale"] = torch.tensor(delta.scale, dtype=torch.float64)
    if delta.offset is not None:
        out["offset.scale"] = torch.tensor(delta.offset.scale, dtype=torch.float64)
    return out


def load_state(adapter: Adapter, values: State, strict: bool = True) -> None:
    """Take over a state; raises UserError for a tensor that is missing, left over or of the wrong shape.

    A gate, an offset or a rank that differs from the recipe's is taken from the state.
    """
    groups: dict[str, State] = {path: {} for path in adapter.deltas}
    left: State = {}
    for key, value in values.items():
        path = max((p for p in groups if key.startswith(p + ".")), key=len, default=None)
        if path is None:
            left[key] = value
        else:
            groups[path][key[len(path) + 1 :]] = value
    for path, d in adapter.deltas.items():
        load_delta(d, path, groups[path], strict)
    expected: State = {} if adapter.shared is None else {f"shared.{n}": t for n, t in _saved(adapter.shared).items()}
    for hook in adapter.hooks:
        mine = hook.parameters()
        expected |= {f"hook:{hook.name}.{n}": p for n, p in mine.items()}
        if not mine:  # what a method trains only while a run goes on is the run's
            left = {k: v for k, v in left.items() if not k.startswith(f"hook:{hook.name}.")}
    expected |= dict(_once({f"train:{p}": d.parameter() for p, d in adapter.trained.items()}))
    for key, target in expected.items():
        _copy(target, left.pop(key, None), key, strict)
    adapter.root.switch.change()  # an offset may have come
    if left and strict:
        first = sorted(left)[0]
        raise UserError(f"the state holds {first!r}, which this adapter has no place for{nearest(first, expected)}")


def load_delta(delta: Delta, path: str, own: State, strict: bool = True) -> None:
    """Take over the saved tensors of one delta."""
    own = dict(own)
    if hasattr(delta, "match"):  # a form whose tensors come and go makes those that the state holds
        delta.match(own)
    if "scale" in own:
        delta.scale = float(own.pop("scale"))
    if "offset.A" in own and delta.offset is None:
        pair = Pair(own["offset.A"], own["offset.B"], 1.0)
        delta.offset = Offset(delta.site, pair, delta.adapter_name).to(delta.site_device())
    if "offset.scale" in own:
        delta.offset.scale = float(own.pop("offset.scale"))
    if "gate" in own and delta.gate is None:
        delta.set_gate(own["gate"])
    elif delta.gate is not None and "gate" not in own:
        delta.set_gate(None)
    known = _saved(delta) | {n: getattr(delta, n) for n in delta.rebuilt}
    for name, value in own.items():
        if name not in known:
            if strict:
                raise UserError(f"{path} has no tensor {name!r}{nearest(name, known)}")
            continue
        if known[name].shape != value.shape and "." not in name:
            _resize(delta, path, name, known[name], value)
        else:
            _copy(known[name], value, f"{path}.{name}", strict)
        delta.rebuilt.discard(name)
    missing = [n for n in _saved(delta) if n not in own]
    if missing and strict:
        raise UserError(f"the state lacks {path}.{missing[0]}")


def _resize(delta: Delta, path: str, name: str, old: Tensor, value: Tensor) -> None:
    """Take a tensor of another rank; the layer's own dimensions must agree."""
    slot = next((s for s in delta.slots() if s.name == name), None)
    rank = getattr(delta, "rank", None)
    differing = [(a, b) for a, b in zip(old.shape, value.shape) if a != b]
    if slot is None or old.ndim != value.ndim or any(a != rank and delta.gate is None for a, _ in differing):
        raise UserError(f"{path}.{name} has shape {tuple(value.shape)}; this model's layer wants {tuple(old.shape)}")
    delta.set_tensor(name, value, trained=isinstance(old, nn.Parameter))
    if name == "B" or slot.role == "factor_b":
        delta.rank = value.shape[1]


def layout(adapter: Adapter) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the trained tensors in the order of ``vector``."""
    return [(n, tuple(p.shape)) for n, p in adapter.named_parameters()]


def vector(adapter: Adapter) -> Tensor:
    """All trained tensors as one flat fp32 vector."""
    parts = [p.detach().reshape(-1).float() for p in adapter.parameters()]
    return torch.cat(parts) if parts else torch.zeros(0)


@torch.no_grad()
def set_vector(adapter: Adapter, flat: Tensor) -> None:
    """Write a flat vector back into the trained tensors; raises UserError when its length differs."""
    if flat.numel() != adapter.parameter_count():
        raise UserError(f"the vector has {flat.numel()} numbers; this adapter trains {adapter.parameter_count()}")
    at = 0
    for p in adapter.parameters():
        p.copy_(flat[at : at + p.numel()].view_as(p))
        at += p.numel()


@contextmanager
def using(adapter: Adapter, values: State) -> Iterator[Adapter]:
    """Run with other values of the tensors (keys as in ``state``; those left out stay)."""
    own = state(adapter)
    unknown = sorted(set(values) - set(own))
    if unknown:
        raise UserError(f"this adapter has no tensor {unknown[0]!r}{nearest(unknown[0], own)}")
    before = {k: own[k].clone() for k in values}
    with torch.no_grad():
        for k, v in values.items():
            own[k].copy_(v)
    try:
        yield adapter
    finally:
        with torch.no_grad():
            for k, v in before.items():
                own[k].copy_(v)


def clone(values: State) -> State:
    """A copy that does not follow training."""
    return {k: v.detach().clone() for k, v in values.items()}


def average(states: Iterable[State], weights: Iterable[float] | None = None) -> State:
    """The weighted mean of states with the same keys and shapes, factor by factor; equal weights by default.

    The mean of factors is not the mean of the changes they make; stack the pairs (``numerics.factored``) for that.
    """
    states = list(states)
    if not states or any(s.keys() != states[0].keys() for s in states):
        raise UserError("average wants at least one state, all with the same tensors")
    shares = [1.0 / len(states)] * len(states) if weights is None else list(weights)
    return {
        k: sum(w * s[k] for w, s in zip(shares, states)) if v.is_floating_point() else v for k, v in states[0].items()
    }


def interpolate(first: State, second: State, share: float) -> State:
    """``(1 − share)·first + share·second``."""
    return average((first, second), (1 - share, share))


def _once(values: State) -> Iterator[tuple[str, Tensor]]:
    """The entries, each tensor under its first name only (tied base tensors)."""
    seen: set[int] = set()
    for key, value in values.items():
        if id(value) not in seen:
            seen.add(id(value))
            yield key, value


def _saved(module: nn.Module) -> State:
    """Parameters and persistent buffers, less what a seed gives again."""
    out: State = {}
    for prefix, m in module.named_modules():
        skip = m._non_persistent_buffers_set | getattr(m, "rebuilt", set())
        own = {n: t for n, t in (*m._parameters.items(), *m._buffers.items()) if t is not None and n not in skip}
        out |= {f"{prefix}.{n}" if prefix else n: t for n, t in own.items()}
    return out


@torch.no_grad()
def _copy(target: Tensor, value: Tensor | None, name: str, strict: bool) -> None:
    if value is None:
        if strict:
            raise UserError(f"the state lacks {name}")
        return
    if target.shape != value.shape:
        head = "; a head for another number of classes?" if name.startswith("train:") else ""
        raise UserError(f"the file's {name} has shape {tuple(value.shape)}, this model's {tuple(target.shape)}{head}")
    target.copy_(value)
