"""Starts that look at data in bounded memory: what is gathered of one block at a time, over all batches.

``parts.evidence`` gathers at every site in one pass, and so holds as much as all of it takes at once: of gradients, the
weights again in fp32. Here the loops are exchanged, blocks outside and batches inside, each block being run from the
hidden states at its door: one forward for what is said of inputs, two and a backward for gradients, however many blocks
there are. Sums are exact. Where the blocks are no plain chain (encoder–decoders, models without blocks), and for layers
outside of them, there is a pass over all batches for each block or layer in its turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.delta import Delta
from veneer.core.hook import Init
from veneer.core.site import Site, inner_sites
from veneer.errors import UserError
from veneer.models import architecture
from veneer.parts.evidence import call, counted
from veneer.parts.modes import in_mode
from veneer.parts.trunk import hidden, standing_in


class Watcher(Protocol):
    """What is gathered at one site."""

    def inputs(self, site: Site, x: Tensor, mask: Tensor | None) -> None:
        """The layer's input of one batch; ``mask`` (batch, tokens) says which positions count, None that all do."""

    def gradient(self, site: Site, x: Tensor, grad: Tensor) -> None:
        """The layer's input and the gradient of its output, of one batch."""


W = TypeVar("W", bound=Watcher)


class GradientSum:
    """Σ over the batches of ∂loss/∂W (out, in), in fp32; ``total`` is None where no gradient arrived."""

    def __init__(self, site: Site) -> None:
        self.total: Tensor | None = None

    def inputs(self, site: Site, x: Tensor, mask: Tensor | None) -> None:
        """Nothing: padding has no gradient."""

    def gradient(self, site: Site, x: Tensor, grad: Tensor) -> None:
        """Add this batch's."""
        g, rows = site.output_rows(grad), site.input_rows(x)
        G = (g.T @ rows.to(g.dtype)).float()
        self.total = G if self.total is None else self.total.add_(G)


class LayerwiseInit(Init):
    """An init that starts every site from what was gathered there, and lets that go before the next block's.

    It looks at the model with the new adapter off, so at a converted base as it was converted.
    """

    backward: ClassVar[bool] = False  # whether gradients are wanted
    count = 0  # calibration batches

    def watcher(self, site: Site) -> Watcher:
        """What gathers at a site; where no gradients are wanted, layers that read one tensor share the first's."""
        raise NotImplementedError

    def start_from(self, delta: Delta, found: Any) -> dict[str, Tensor]:
        """Tensors by role for one delta, from what the watcher of its site holds."""
        raise NotImplementedError

    def start(self, site: Site, slots: list[Any], evidence: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Nothing yet: the starts come once all stands."""
        return {}

    def settle(self, adapter: Adapter, batches: list[Any]) -> None:
        """Gather and start, block by block."""
        members: dict[str, list[Delta]] = {}
        for delta in adapter.members():
            members.setdefault(delta.site.path, []).append(delta)
        sites, self.count = [s for s in inner_sites(adapter.sites) if s.path in members], len(batches)
        with adapter.disabled():
            for site, found in layerwise(adapter.model, sites, batches, self.watcher, self.backward):
                self._begin(members[site.path], found)
        adapter.root.switch.change()  # offsets have come

    @torch.no_grad()
    def _begin(self, deltas: list[Delta], found: Any) -> None:
        start = self.start_from(deltas[0], found)  # experts of one layer start alike
        for delta in deltas:
            roles = {s.role for s in delta.slots()}
            lacking = sorted(set(start) - roles)
            if lacking:
                raise UserError(f"{self.name} starts {lacking[0]}, which {delta.name} does not have")
            delta.fill({role: value.clone() for role, value in start.items()})
            if self.offset:
                delta.freeze_offset()


def layerwise(
    model: nn.Module, sites: list[Site], batches: list[Any], make: Callable[[Site], W], backward: bool = False
) -> Iterator[tuple[Site, W]]:
    """Each site with what its watcher saw over all batches, a block's sites at a time.

    The model runs in eval mode; its modes and flags are as before once the iteration has ended. Nothing is kept of a
    site when the next block's turn comes, if the caller keeps nothing. With ``backward`` the hidden states at the doors
    of the blocks are held as well, of every k-th block where the batches are so long that this takes less, k blocks'
    sums then being alive.

    Raises:
        UserError: no batch, or with ``backward`` one that gives no loss.
    """
    if not batches:
        raise UserError("calibration holds no batch; give at least one")
    with as_it_is(model):
        size = _chain(model, batches[0])
        blocks = [(path, block) for path, block in architecture.blocks(model)] if size is not None else []
        groups = [[s for s in sites if s.path.startswith(f"{path}.")] for path, _ in blocks]
        inside = {s.path for group in groups for s in group}
        for group in _apart(model, [s for s in sites if s.path not in inside]):
            with _watched(group, make, backward) as seen:
                for batch in batches:
                    seen.play(lambda batch=batch: _run(model, batch, backward), batch)
            yield from seen.pop()
        if inside:
            chain = [b for _, b in blocks]
            if backward:
                yield from _backwards(model, chain, groups, batches, make, size)
            else:
                yield from _forwards(model, chain, groups, batches, make)


class _Seen:
    """The watchers of a group of sites while they watch."""

    def __init__(self, group: list[Site], backward: bool) -> None:
        self.group, self.backward = group, backward
        self.found: dict[str, Any] = {}
        self.mask: Tensor | None = None
        self.last: tuple[Any, Any] = (None, None)

    def play(self, run: Callable[[], Any], batch: Any) -> Any:
        """Run one batch."""
        self.mask, self.last = counted(batch, False), (None, None)
        with torch.set_grad_enabled(self.backward):
            return run()

    def hook(self, site: Site, make: Callable[[Site], Any]) -> Callable[..., Tensor | None]:
        def see(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            x = args[0].detach()
            if site.path not in self.found:
                shared = not self.backward and args[0] is self.last[0]
                self.found[site.path] = self.last[1] if shared else make(site)
            watcher = self.found[site.path]
            fits = self.mask is not None and x.ndim >= 2 and self.mask.shape == x.shape[:2]
            if args[0] is not self.last[0] or watcher is not self.last[1]:
                with torch.no_grad():
                    watcher.inputs(site, x, self.mask if fits else None)
            self.last = (args[0], watcher)
            if not self.backward:
                return None
            fresh = None if output.requires_grad else output.detach().requires_grad_()
            target = output if fresh is None else fresh
            target.register_hook(lambda grad: watcher.gradient(site, x, grad.detach()))
            return None if fresh is None else fresh.clone()  # what follows may write in place

        return see

    def pop(self) -> Iterator[tuple[Site, Any]]:
        """Each site and its watcher, which is let go."""
        for site in self.group:
            if site.path in self.found:
                yield site, self.found.pop(site.path)
        self.last = (None, None)


@contextmanager
def _watched(group: list[Site], make: Callable[[Site], Any], backward: bool) -> Iterator[_Seen]:
    seen = _Seen(group, backward)
    handles = [s.module.register_forward_hook(seen.hook(s, make)) for s in group]
    try:
        yield seen
    finally:
        for h in handles:
            h.remove()


class _Stopped(Exception):
    """The run has gone as far as was asked."""


def _forwards(
    model: nn.Module, blocks: list[nn.Module], groups: list[list[Site]], batches: list, make: Callable
) -> Iterator[tuple[Site, Any]]:
    """Block by block towards the head."""
    states: list[Any] = [None] * len(batches)
    at = 0
    for index, group in enumerate(groups):
        if not group:
            continue
        with _watched(group, make, False) as seen:
            for i, batch in enumerate(batches):
                states[i] = seen.play(partial(_span, model, blocks, at, index, batch, states[i]), batch)
        at = index + 1
        yield from seen.pop()


def _backwards(
    model: nn.Module, blocks: list[nn.Module], groups: list[list[Site]], batches: list, make: Callable, size: int
) -> Iterator[tuple[Site, Any]]:
    """Span by span from the head down; the first pass goes through all of the model and leaves the states."""
    first = next(i for i, group in enumerate(groups) if group)
    sums = max(sum(4 * s.out_features * s.in_features for s in group) for group in groups)  # bytes, of a block
    span = min(len(blocks) - first, max(1, math.ceil(math.sqrt(size * len(batches) / sums))))
    doors = list(range(first, len(blocks), span))
    states: dict[int, list[Tensor]] = {door: [] for door in doors}
    grads: list[Tensor | None] = []

    def sites(door: int) -> list[Site]:
        return [s for group in groups[door : door + span] for s in group]

    with _watched(sites(doors[-1]), make, True) as seen:
        for batch in batches:
            leaf = seen.play(partial(_first_pass, model, blocks, doors, batch, states), batch)
            grads.append(leaf.grad)
    yield from seen.pop()
    for door in reversed(doors[:-1]):
        with _watched(sites(door), make, True) as seen:
            for i, batch in enumerate(batches):
                leaf = states[door][i].requires_grad_()
                last = door + span - 1
                out = seen.play(partial(_span, model, blocks, door, last, batch, leaf, enter=True), batch)
                if grads[i] is not None:
                    torch.autograd.backward(hidden(out), grads[i])
                grads[i], states[door][i] = leaf.grad, None
                del out, leaf
        yield from seen.pop()


def _first_pass(
    model: nn.Module, blocks: list[nn.Module], doors: list[int], batch: Any, states: dict[int, list[Tensor]]
) -> Tensor:
    """Forward through all, backward through the last span; the states at the doors are noted. Gives the last one."""
    leaf: list[Tensor] = []

    def note(door: int) -> Callable[..., tuple]:
        def pre(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            h = (args[0] if args else kwargs["hidden_states"]).detach()
            if door != doors[-1]:
                states[door].append(h)
                return None
            leaf.append(h.requires_grad_())
            return _with_hidden(leaf[0], args, kwargs)

        return pre

    handles = [blocks[d].register_forward_pre_hook(note(d), with_kwargs=True) for d in doors]
    try:
        _run(model, batch, True)
    finally:
        for h in handles:
            h.remove()
    return leaf[0]


def _span(
    model: nn.Module, blocks: list[nn.Module], first: int, last: int, batch: Any, state: Any, enter: bool = False
) -> Any:
    """The output of block ``last`` when the blocks from ``first`` run on ``state``: the output of the block before,
    or with ``enter`` the input itself (None: that of the embedding)."""
    found: list[Any] = []

    def pre(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return _with_hidden(state, args, kwargs)

    def stop(module: nn.Module, args: tuple, output: Any) -> None:
        found.append(output)
        raise _Stopped

    handles = [blocks[last].register_forward_hook(stop)]
    handles += [blocks[first].register_forward_pre_hook(pre, with_kwargs=True)] if enter else []
    skipped = {b: lambda *a, **k: state for b in blocks[:first]}
    try:
        with standing_in(skipped), suppress(_Stopped):
            _run(model, batch, False)
    finally:
        for h in handles:
            h.remove()
    return found[0]


def _with_hidden(h: Tensor, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return ((h, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": h})


def _output(model: nn.Module, batch: Any) -> Any:
    if hasattr(batch, "items") and hasattr(getattr(model, "config", None), "use_cache"):
        batch = {"use_cache": False} | dict(batch.items())
    return call(model, batch, False)


def batch_loss(model: nn.Module, batch: Any) -> Tensor:
    """The model's own loss on a calibration batch; raises UserError where it gives none."""
    loss = getattr(_output(model, batch), "loss", None)
    if loss is None:
        raise UserError("the calibration batches give no loss: add labels to every batch")
    return loss


def _run(model: nn.Module, batch: Any, backward: bool) -> None:
    """Run the model, and with ``backward`` back from its loss."""
    if not backward:
        _output(model, batch)
        return
    loss = batch_loss(model, batch)
    if loss.requires_grad:
        loss.backward()


def _chain(model: nn.Module, batch: Any) -> int | None:
    """Bytes of a hidden state of this batch, if each block takes the one before's output and nothing else of it."""
    blocks = [b for _, b in architecture.blocks(model)]
    given: list[Any] = []
    made: list[Any] = []

    def pre(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given.append(args[0] if args else kwargs.get("hidden_states"))

    handles = [b.register_forward_pre_hook(pre, with_kwargs=True) for b in blocks]
    handles += [b.register_forward_hook(lambda m, a, y: made.append(y)) for b in blocks]
    try:
        with torch.no_grad():
            _run(model, batch, False)
    finally:
        for h in handles:
            h.remove()
    lone = all(isinstance(y, Tensor) or (isinstance(y, tuple) and all(v is None for v in y[1:])) for y in made)
    if not blocks or len(given) != len(blocks) or not lone:
        return None
    if any(x is not hidden(y) for x, y in zip(given[1:], made)):
        return None
    return given[0].numel() * given[0].element_size()


def _apart(model: nn.Module, sites: list[Site]) -> list[list[Site]]:
    """The sites by block, or by layer outside of blocks."""
    paths = [path for path, _ in architecture.blocks(model)]
    groups: dict[str, list[Site]] = {}
    for site in sites:
        owner = next((p for p in paths if site.path.startswith(f"{p}.")), site.module_path)
        groups.setdefault(owner, []).append(site)
    return list(groups.values())


@contextmanager
def as_it_is(model: nn.Module) -> Iterator[None]:
    """In eval mode, with every tensor frozen."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with in_mode(model):
            model.requires_grad_(False)
            yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
