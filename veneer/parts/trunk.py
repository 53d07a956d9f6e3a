"""Running a part of the trunk's blocks: for what learns beside the base without a backward pass through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.context import KEY
from veneer.core.site import Site, module_site
from veneer.errors import UserError
from veneer.models import architecture

FOLLOWED = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")


@dataclass
class Trace:
    """What a run of the blocks left: hidden states, the blocks' calls and outputs, the trunk's own output.

    ``states[0]`` is the input of the first block and ``states[i]`` the output of block i − 1, each (batch, tokens, d);
    ``calls[i]`` are the arguments of block i after its hidden state, the masks and positions among them, with a
    key-value cache of their own where one was asked for.
    """

    states: list[Tensor] = field(default_factory=list)
    calls: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    output: Any = None


class _Stopped(Exception):
    """The run has gone as far as was asked."""


def hidden(output: Any) -> Tensor:
    """The hidden state of a block's or a trunk's output."""
    return output if isinstance(output, Tensor) else output[0]


def replaced(trunk: nn.Module, output: Any, h: Tensor) -> Any:
    """The trunk's output with ``h`` as its hidden state, and pooled again where the trunk pools."""
    if isinstance(output, Tensor):
        return h
    pooler = getattr(trunk, "pooler", None)
    if not hasattr(output, "keys"):
        pooled = 1 if pooler is None else 2
        return (h, *(pooler(h) for _ in output[1:pooled]), *output[pooled:])
    changed = {"last_hidden_state": h}
    if pooler is not None and output.get("pooler_output") is not None:
        changed["pooler_output"] = pooler(h)
    return type(output)(**(dict(output) | changed))


def states(
    trunk: nn.Module,
    run: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    stop: int | None = None,
    cache: str | None = None,
) -> Trace:
    """Run the blocks before ``stop`` (all, and the rest of the trunk, when None) without gradient.

    ``run(*args, **kwargs)`` is the trunk's own forward. The states are detached and carry no graph. ``cache`` names a
    second key-value cache (see ``beside``) that stands for the call's own in ``calls``, for what runs beside the trunk.
    """
    trace = Trace()
    blocks = [b for _, b in architecture.blocks(trunk)]

    def own(value: Any) -> Any:
        return beside(value, cache) if cache is not None and hasattr(value, "get_seq_length") else value

    def before(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple, named: dict[str, Any]) -> None:
            if index == 0:
                trace.states.append((given[0] if given else named["hidden_states"]).detach())
            if index == stop:
                raise _Stopped
            others = {k: own(v) for k, v in named.items() if k not in ("hidden_states", KEY)}
            trace.calls.append((tuple(own(v) for v in given[1:]), others))

        return hook

    def after(module: nn.Module, given: tuple, named: dict[str, Any], output: Any) -> None:
        trace.outputs.append(output)
        trace.states.append(hidden(output).detach())

    with torch.no_grad(), _hooked(blocks, before, after), suppress(_Stopped):
        trace.output = run(*args, **kwargs)
    return trace


def resume(
    trunk: nn.Module, run: Callable[..., Any], h: Tensor, trace: Trace, args: tuple, kwargs: dict[str, Any], start: int
) -> Any:
    """Run the rest of the trunk from block ``start`` on the hidden state ``h``, with gradient as the caller has it.

    Masks and positions are those of the same call: ``trace`` came from ``states(…, stop=start)`` with these arguments.
    The blocks before ``start`` are not run again.
    """
    blocks = [b for _, b in architecture.blocks(trunk)]
    skipped = list(zip(blocks[:start], trace.outputs))

    def enter(module: nn.Module, given: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if given:
            return (h, *given[1:]), named
        return given, named | {"hidden_states": h}

    handle = blocks[start].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with standing_in({b: lambda *a, output=output, **k: output for b, output in skipped}):
            return run(*args, **kwargs)
    finally:
        handle.remove()


@contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within it each module runs the function given for it in place of its forward."""
    own = {m: m.__dict__.get("forward") for m in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward in own.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


@contextmanager
def _hooked(blocks: list[nn.Module], before: Callable[[int], Any], after: Callable[..., None]):
    handles = [b.register_forward_pre_hook(before(i), with_kwargs=True) for i, b in enumerate(blocks)]
    handles += [b.register_forward_hook(after, with_kwargs=True) for b in blocks]
    try:
        yield
    finally:
        for h in handles:
            h.remove()


def beside(first: Any, name: str) -> Any:
    """The cache called ``name`` that hangs on a key-value cache and is reordered, cut and repeated with it.

    It is made, empty, while the first one is. Raises UserError when that has been filled without it.
    """
    if not isinstance(first, _Followed):
        first.__class__ = _followed(type(first))
        first.beside = {}
    if name not in first.beside:
        if int(first.get_seq_length()):
            raise UserError(
                f"the key-value cache was filled while {name!r} was off, which keeps states of its own there: "
                "begin with a new cache"
            )
        other = first.beside[name] = deepcopy(first)
        other.beside = {}
    return first.beside[name]


class _Followed:
    """Mixed into a cache's class: what is done to its rows is done to those beside it."""

    beside: dict[str, Any]


@cache
def _followed(cls: type) -> type:
    def follow(method: str) -> Callable[..., None]:
        def run(self: Any, *args: Any, **kwargs: Any) -> None:
            getattr(cls, method)(self, *args, **kwargs)
            for other in self.beside.values():
                getattr(other, method)(*args, **kwargs)

        return run

    methods = {m: follow(m) for m in FOLLOWED if hasattr(cls, m)}
    return type(cls.__name__, (_Followed, cls), methods | {"__module__": __name__})


@contextmanager
def unchecked(blocks: list[nn.Module]) -> Iterator[None]:
    """Within it these blocks are not checkpointed: they would be run again without what stands beside or for them."""
    on = [b for b in blocks if getattr(b, "gradient_checkpointing", False)]
    try:
        for b in on:
            b.gradient_checkpointing = False
        yield
    finally:
        for b in on:
            b.gradient_checkpointing = True


def place(model: nn.Module, name: str) -> Site:
    """The trunk as the one site of the side network ``name``, whatever is selected."""
    inner, config = architecture.trunk(model), architecture.text_config(model)
    path = next(n for n, m in model.named_modules() if m is inner)
    if not path or config is None or getattr(config, "is_encoder_decoder", False) or not architecture.blocks(inner):
        raise UserError(
            f"{name} runs beside a transformers trunk with blocks under one head; {type(model).__name__} is "
            "another kind of model (encoder–decoders are not supported)"
        )
    return module_site(model, path)
