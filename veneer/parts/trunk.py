"""Running a part of the trunk's blocks: for what learns beside the base without a backward pass through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.models import architecture


@dataclass
class Trace:
    """What a run of the blocks left: hidden states, the blocks' calls and outputs, the trunk's own output.

    ``states[0]`` is the input of the first block and ``states[i]`` the output of block i − 1, each (batch, tokens, d);
    ``calls[i]`` are the arguments of block i after its hidden state, the masks and positions among them.
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


def states(
    trunk: nn.Module, run: Callable[..., Any], args: tuple, kwargs: dict[str, Any], stop: int | None = None
) -> Trace:
    """Run the blocks before ``stop`` (all, and the rest of the trunk, when None) without gradient.

    ``run(*args, **kwargs)`` is the trunk's own forward. The states are detached and carry no graph.
    """
    trace = Trace()
    blocks = [b for _, b in architecture.blocks(trunk)]

    def before(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple, named: dict[str, Any]) -> None:
            if index == 0:
                trace.states.append((given[0] if given else named["hidden_states"]).detach())
            if index == stop:
                raise _Stopped
            trace.calls.append((given[1:], {k: v for k, v in named.items() if k != "hidden_states"}))

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
