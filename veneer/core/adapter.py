"""The adapter: all deltas of one recipe on one model, hung, switched and taken off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from veneer.core import adapted
from veneer.core.adapted import Switch
from veneer.core.context import Context, activate, current, deactivate
from veneer.core.delta import Delta, Written
from veneer.core.hook import Hook, Phase, Plan
from veneer.core.recipe import Recipe
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.models import architecture


class Root:
    """What a model with adapters keeps at its root: the switch, the adapters by name, the pass hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.switch = Switch()
        self.adapters: dict[str, Adapter] = {}
        self.stack: list[Any] = []
        self.draws = 0
        self.handles: list[Any] = []
        for module in {id(m): m for m in (model, architecture.trunk(model))}.values():
            self.handles.append(module.register_forward_pre_hook(self.before, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self.after, always_call=True))
        self.handles.extend(adapted.hide(model))
        for _, block in architecture.blocks(model):
            block.__class__ = adapted.swapped(adapted.AdaptedBlock, type(block))

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Open the context of a forward pass, unless one is open, and let deltas prepare."""
        ctx = current()
        if ctx is not None and ctx.call is not None:
            self.stack.append(None)
            return
        token = None
        if ctx is None:
            self.draws += int(module.training)
            ctx = Context(training=module.training, draw=self.draws)
            token = activate(ctx)
        ctx.call = (self.model, module, args, kwargs)
        ctx.mask = ctx.mask if ctx.mask is not None else kwargs.get("attention_mask")
        self.stack.append((token, ctx))
        for name in self.switch.names:
            if name not in self.switch.off:
                for part in self.adapters[name].preparers():
                    part.prepare(ctx)

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Close the context that ``before`` opened."""
        opened = self.stack.pop() if self.stack else None
        if opened is not None:
            token, ctx = opened
            ctx.closed = True
            if token is not None:
                deactivate(token)

    def close(self) -> None:
        """Leave the model as it was."""
        for h in self.handles:
            h.remove()
        for _, block in architecture.blocks(self.model):
            block.__class__ = type(block)._veneer_base
        self.model.__dict__.pop("_veneer", None)


def root_of(model: nn.Module) -> Root:
    """The root record of a model, made when missing."""
    if "_veneer" not in model.__dict__:
        model.__dict__["_veneer"] = Root(model)
    return model.__dict__["_veneer"]


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters attached to a model, by name."""
    root = model.__dict__.get("_veneer")
    return {} if root is None else dict(root.adapters)


class Shared(nn.ModuleDict):
    """What the sites of each adapter share, at the model's root."""

    def forward(self, x: Any) -> Any:
        """``x`` itself: an nn.Sequential runs all its children."""
        return x


class Adapter:
    """All deltas of one recipe on one model; ``veneer.api`` adds what reads, writes, folds and trains it."""

    built: ClassVar[type[Adapter]]  # the class that attach makes: the most derived one

    def __init_subclass__(cls) -> None:
        Adapter.built = cls

    def __init__(self, model: nn.Module, recipe: Recipe, *, name: str, seed: int, base: str, select: Any) -> None:
        self.model, self.recipe, self.name, self.seed, self.base, self.select = model, recipe, name, seed, base, select
        self.sites: list[Site] = []
        self.deltas: dict[str, Delta] = {}
        self.trained: dict[str, Written] = {}
        self.shared: nn.Module | None = None
        self.hooks: list[Hook] = []
        self.plan: Plan = {}
        self.phase = 0
        self.optimizer: torch.optim.Optimizer | None = None
        self.keep_base = True
        self.flags: dict[str, bool] = {}

    @property
    def root(self) -> Root:
        """The record at the model's root."""
        return self.model.__dict__["_veneer"]

    @property
    def phases(self) -> list[Phase]:
        """The phases of the recipe; one when no method has its own."""
        return next((p for h in self.hooks if (p := h.phases())), [Phase("train")])

    def preparers(self) -> list[Any]:
        """The shared module and the deltas that want to act before each forward."""
        pool = [self.shared] if hasattr(self.shared, "prepare") else []
        return pool + [d for d in self.deltas.values() if type(d).prepare is not Delta.prepare]

    def every(self) -> dict[str, Delta]:
        """The deltas and the base tensors that train as they are, by site path."""
        return self.deltas | self.trained

    def members(self) -> Iterator[Delta]:
        """The deltas of the recipe's form, those that a mixture is made of among them."""
        return (m for d in self.deltas.values() for m in d.members())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained tensors in a stable order, each once: sites, shared, hooks, then ``train``."""
        every: list[tuple[str, nn.Parameter]] = []
        for path, d in self.deltas.items():
            every += [(f"{path}.{n}", p) for n, p in d.named_parameters()]
        if self.shared is not None:
            every += [(f"shared.{n}", p) for n, p in self.shared.named_parameters()]
        every += [(f"hook:{h.name}.{n}", p) for h in self.hooks for n, p in h.parameters().items()]
        every += [(f"train:{path}", d.parameter()) for path, d in self.trained.items()]
        seen: set[int] = set()
        for key, p in every:
            if p.requires_grad and id(p) not in seen:
                seen.add(id(p))
                yield key, p

    def parameters(self) -> list[nn.Parameter]:
        """The trained tensors."""
        return [p for _, p in self.named_parameters()]

    def parameter_count(self) -> int:
        """How many numbers train."""
        return sum(p.numel() for p in self.parameters())

    def pairs(self) -> Iterator[tuple[Site, nn.Parameter, nn.Parameter, float]]:
        """(site, A, B, scale) of every delta whose pair is two Parameters, ungated."""
        for d in self.members():
            pair = d.pair()
            if pair is not None and isinstance(pair.A, nn.Parameter) and isinstance(pair.B, nn.Parameter):
                yield d.site, pair.A, pair.B, pair.scale

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model as it was before this adapter, bit for bit."""
        if not self.keep_base:
            raise UserError(f"the adapter {self.name!r} was attached with keep_base=False: the base weights are gone")
        with self.root.switch.without(self.name):
            yield

    def hang(self, path: str, delta: Delta, trained: bool = False) -> None:
        """Hang one delta on its module; ``trained`` marks a base tensor that trains as it is."""
        if isinstance(delta, Written):
            every = [w for a in self.root.adapters.values() for w in a.every().values() if isinstance(w, Written)]
            owners = [w for w in every if w.base_tensor() is delta.base_tensor()]
            first = next((w for w in owners if w.adapter_name == self.name), None)
            delta.begin(first, owners[-1] if owners else None)
        delta.train(delta.site.module.training)
        adapted.swap_in(delta.site.module, self._key(delta), delta, self.root.switch)
        (self.trained if trained else self.deltas)[path] = delta
        self.root.switch.change()

    def drop(self, delta: Delta) -> None:
        """Take one delta off its module."""
        adapted.swap_out(delta.site.module, self._key(delta))
        self.root.switch.change()

    def _key(self, delta: Delta) -> str:
        part = delta.site.role if delta.site.rows is not None else (delta.site.name or "")
        return f"{self.name}:{part}" if part else self.name

    def remove(self) -> None:
        """Take everything off the model."""
        for d in self.every().values():
            self.drop(d)
        root, shared = self.root, self.model._modules.get("veneer_shared")
        del root.adapters[self.name]
        if self.shared is not None and shared is not None:
            del shared._modules[self.name]
            if not len(shared):
                del self.model._modules["veneer_shared"]
        off, folded = root.switch.off - {self.name}, root.switch.folded - {self.name}
        root.switch.change(names=tuple(n for n in root.switch.names if n != self.name), off=off, folded=folded)
        if not root.adapters:
            for name, p in self.model.named_parameters():
                p.requires_grad_(self.flags.get(name, p.requires_grad))
            root.close()
        self.deltas, self.trained = {}, {}

    def start_phase(self) -> None:
        """Let train what this phase trains."""
        wanted = self.phases[self.phase].trainable
        if any(p.trainable is not None for p in self.phases):
            for d in self.deltas.values():
                for slot in (s for s in d.slots() if s.trained):
                    getattr(d, slot.name).requires_grad_(wanted is None or slot.name in wanted)


Adapter.built = Adapter
