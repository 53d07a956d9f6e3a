"""How a module runs with deltas: its class is swapped for a cached subclass, so paths and isinstance stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.context import KEY, current, using
from veneer.core.delta import Delta, Offset, Written
from veneer.core.site import Site, stored
from veneer.errors import UserError

Link = Delta | Offset


class Switch:
    """Which adapters of a model act, in the order they were attached; one object for all its modules."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.off: frozenset[str] = frozenset()
        self.folded: frozenset[str] = frozenset()
        self.version = 0

    def change(self, **sets: Any) -> None:
        """Set ``names`` (those attached), ``off`` (those switched off) or ``folded`` (those now in the weights)."""
        vars(self).update(sets)
        self.version += 1

    @contextmanager
    def without(self, *names: str):
        """Run with the adapters of these names off."""
        before = self.off
        self.change(off=before | set(names))
        try:
            yield
        finally:
            self.change(off=before)


class Base:
    """What lies beneath a delta: the module's own forward, or the next delta down."""

    def __init__(
        self, site: Site, runner: Callable[..., Any], links: tuple[Link, ...] = (), known: tuple | None = None
    ) -> None:
        self.site, self.runner, self.links = site, runner, links
        self.known = known  # (input, output of the row range) when the whole fused projection has run already

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.links:
            below = Base(self.site, self.runner, self.links[:-1], self.known)
            return self.links[-1].run(args[0], below, *args[1:], **kwargs)
        if self.known is not None:
            x, y = self.known
            return y if args[0] is x else self.site.run(args[0], self.site.weight(), self.site.bias())
        return self.runner(*args, **kwargs)

    def plus(self, x: Tensor, change: Tensor) -> Tensor:
        """``base(x) + change``; a plain layer in half precision adds in its product, in fp32.

        A base that is rounded before the sum swallows a change of less than half of its last digit.
        """
        W = self.site.weight() if self.fusable and not self.links and stored(self.site.module) is None else None
        half = x.dtype == change.dtype and x.dtype in (torch.bfloat16, torch.float16)
        if W is None or not half or W.dtype != x.dtype or W.requires_grad or change.shape[:-1] != x.shape[:-1]:
            return self(x) + change
        y, b = torch.addmm(change.flatten(0, -2), x.flatten(0, -2), W.t()).view(change.shape), self.own_bias()
        return y if b is None else y + b

    def without(self, names: Iterable[str]) -> Base:
        """The same without the deltas of these adapters."""
        kept = tuple(link for link in self.links if link.adapter_name not in set(names))
        return Base(self.site, self.runner, kept, self.known)

    @property
    def fusable(self) -> bool:
        """Whether the product can be fused into the layer's own: a whole linear layer with a dense weight."""
        return self.site.kind == "linear" and self.site.rows is None and "_veneer_forward" not in vars(self.site.module)

    def source(self) -> Tensor | Callable[[], Tensor]:
        """The layer's dense weight, or a function that dequantises it."""
        dequantise = stored(self.site.module)
        return self.site.weight() if dequantise is None else self.site.weight

    def own_bias(self) -> Tensor | None:
        """The layer's own bias."""
        return self.site.bias()

    def weight(self) -> Tensor:
        """The dense weight (out, in) of all that lies beneath, in fp32."""
        return self._folded()[0]

    def bias(self) -> Tensor | None:
        """The bias (out,) of all that lies beneath, in fp32, or None."""
        return self._folded()[1]

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        W, b = self.site.weight().float(), self.site.bias()
        b = b if b is None else b.float()
        for link in self.links:
            W, b = link.fold(W, b)
        return W, b

    @property
    def parts(self) -> dict[str, Callable[..., Any]]:
        """At a module site: the inner layers by role, each run as it stands."""
        return {role: part.module for role, part in self.site.parts.items()}


class Swapped:
    """A class put in place of a module's own; pickling and copying go by the own class and the mixin."""

    _veneer_base: type[nn.Module]
    _veneer_mixin: type

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _rebuilt, (self._veneer_mixin, self._veneer_base), self.__dict__


class Adapted(Swapped):
    """Mixed into a module's class: runs the deltas hung on ``veneer`` around the module's own forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        whole, rows, tensors = self.veneer_links()
        if tensors:
            with _replaced(self, tensors):
                return self.veneer_run(whole, rows, args, kwargs)
        return self.veneer_run(whole, rows, args, kwargs)

    def veneer_run(self, whole: tuple, rows: tuple, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the deltas on the whole layer, then those on row ranges of it."""
        if not whole and not rows:
            return self.veneer_own(*args, **kwargs)
        if rows:
            return _run_rows(self, rows, args, kwargs)
        if not args:
            name, x = next(iter(kwargs.items())) if whole[-1].site.kind != "module" else (None, None)
            args = (kwargs.pop(name),) if name else (x,)
        base = Base(whole[-1].site, self.veneer_own, whole[:-1])
        return whole[-1].run(args[0], base, *args[1:], **kwargs)

    def veneer_own(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward as it was before any delta."""
        own = self.__dict__.get("_veneer_forward")
        if args and args[0] is None:
            args = args[1:]
        return own(*args, **kwargs) if own is not None else super().forward(*args, **kwargs)

    def veneer_links(self) -> tuple[tuple, tuple, tuple]:
        """The active links on the whole layer, on row ranges, and the tensors that stand in for parameters."""
        switch = self.__dict__["_veneer_switch"]
        cached = self.__dict__.get("_veneer_cache")
        if cached is not None and cached[0] == switch.version:
            return cached[1]
        whole: list[Link] = []
        rows: list[Delta] = []
        tensors: list[Delta] = []
        for name in switch.names:
            for key, delta in self.veneer.items():
                if key.partition(":")[0] != name:
                    continue
                if name in switch.folded or name in switch.off:
                    continue
                if delta.site.name is not None:
                    tensors.append(delta)
                elif delta.site.rows is not None:
                    rows.append(delta)
                else:
                    whole.extend(delta.under())
        links = (tuple(whole), tuple(rows), tuple(tensors))
        self.__dict__["_veneer_cache"] = (switch.version, links)
        return links


def _run_rows(module: nn.Module, deltas: tuple[Delta, ...], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    x = args[0] if args else next(iter(kwargs.values()))
    y = module.veneer_own(*args, **kwargs)
    pieces, at = [], 0
    ranges = {(d.site.rows.start, d.site.rows.stop): d.site for d in deltas}
    for (start, stop), site in sorted(ranges.items()):
        links = tuple(link for d in deltas if d.site.rows.start == start for link in d.under())
        pieces.append(y[..., at:start])
        base = Base(site, module.veneer_own, links[:-1], (x, y[..., start:stop]))
        pieces.append(links[-1].run(x, base))
        at = stop
    return torch.cat([p for p in [*pieces, y[..., at:]] if p.shape[-1]], dim=-1)


@contextmanager
def _replaced(module: nn.Module, tensors: tuple[Delta, ...]):
    """Compute with other values in place of parameters for the length of one forward."""
    before = {}
    for delta in tensors:
        name = delta.site.name
        p = module._parameters[name]
        dtype = p.dtype if p is not None else vars(module).get("weight_dtype") or module.weight.dtype
        if isinstance(delta, Written):
            value = delta.parameter()
        else:
            value = delta.weight(p) if p is None else p + delta.weight(p)
        before.setdefault(name, p)
        module._parameters[name] = value.to(dtype)
    try:
        yield
    finally:
        module._parameters.update(before)


class AdaptedBlock(Swapped):
    """Mixed into a block's class: the forward context rides in the call's keywords, so recomputation gets it too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault(KEY, current())
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        ctx = kwargs.pop(KEY, None)
        with using(ctx if ctx is not None else current()):
            return super().forward(*args, **kwargs)


@cache
def swapped(mixin: type, cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``cls`` with a mixin; one per class. A block's keeps the name, by which wrapping policies go."""
    name = cls.__name__ if mixin is AdaptedBlock else f"Adapted{cls.__name__}"
    return type(name, (mixin, cls), {"_veneer_base": cls, "_veneer_mixin": mixin, "__module__": __name__})


def _rebuilt(mixin: type, cls: type[nn.Module]) -> nn.Module:
    new = swapped(mixin, cls)
    return new.__new__(new)


def _hide_from_state_dict(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    for key in [k for k in state if k.startswith(prefix + "veneer.") or k.startswith(prefix + "veneer_shared.")]:
        del state[key]


def _forgive_missing(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [k for k in keys.missing_keys if ".veneer." not in f".{k}" and "veneer_shared." not in k]


def hide(module: nn.Module) -> tuple:
    """Keep the deltas of a module out of its state dict; strict loading of a base file does not miss them."""
    return (
        module.register_state_dict_post_hook(_hide_from_state_dict),
        module.register_load_state_dict_post_hook(_forgive_missing),
    )


def swap_in(module: nn.Module, key: str, delta: Delta, switch: Switch) -> None:
    """Hang a delta on a module under ``key`` and make the module run it."""
    if not isinstance(module, Adapted):
        if "veneer" in module._modules:
            raise UserError(f"the module {type(module).__name__} already has a child called 'veneer'")
        if "forward" in module.__dict__:
            module.__dict__["_veneer_forward"] = module.__dict__.pop("forward")
        module.__class__ = swapped(Adapted, type(module))
        module.veneer = nn.ModuleDict()
        module.__dict__["_veneer_switch"] = switch
        module.__dict__["_veneer_hooks"] = hide(module)
    module.veneer[key] = delta


def swap_out(module: nn.Module, key: str) -> None:
    """Take a delta off; the last one gives the module its class back."""
    del module.veneer[key]
    if len(module.veneer):
        return
    del module._modules["veneer"]
    for handle in module.__dict__.pop("_veneer_hooks"):
        handle.remove()
    module.__dict__.pop("_veneer_cache", None)
    del module.__dict__["_veneer_switch"]
    module.__class__ = type(module)._veneer_base
    if "_veneer_forward" in module.__dict__:
        module.__dict__["forward"] = module.__dict__.pop("_veneer_forward")


def beneath(site: Site) -> Base:
    """What a delta built now will lie on: the layer with the adapters that act on it."""
    module = site.module
    if not isinstance(module, Adapted):
        return Base(site, module.forward)
    whole, rows, _ = module.veneer_links()
    mine = tuple(link for d in rows if d.site.rows == site.rows for link in d.under())
    return Base(site, module.veneer_own, whole if site.rows is None else mine)
