"""The adapter: all deltas of one recipe on one model, as a thing to train, switch, fold and carry away."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core import adapted
from veneer.core.adapted import Switch
from veneer.core.context import Context, _current, current
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
            block.__class__ = adapted.block_class(type(block))

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Open the context of a forward pass, unless one is open, and let deltas prepare."""
        ctx = current()
        if ctx is not None and ctx.facts.get("prepared"):
            self.stack.append(None)
            return
        token = None
        if ctx is None:
            self.draws += int(module.training)
            ctx = Context(training=module.training, draw=self.draws)
            token = _current.set(ctx)
        ctx.facts["prepared"] = True
        ctx.mask = ctx.mask if ctx.mask is not None else kwargs.get("attention_mask")
        ctx.base_pass = lambda: self.base_pass(module, args, kwargs)
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
                _current.reset(token)

    @torch.no_grad()
    def base_pass(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The trunk's last hidden state with every adapter off."""
        trunk = architecture.trunk(self.model)
        known = inspect.signature(trunk.forward).parameters
        call = {k: v for k, v in kwargs.items() if k in known and k != "labels"}
        if call.get("past_key_values") is not None:
            call["past_key_values"] = _twin(call["past_key_values"])
        with self.switch.without(*self.switch.names):
            out = trunk(*args, **call)
        return out[0] if not isinstance(out, Tensor) else out

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


class Adapter:
    """All deltas of one recipe on one model. Made by ``attach``; not by hand."""

    built: ClassVar[type[Adapter]]

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

    # -- what it holds -----------------------------------------------------------------------------------------------

    @property
    def root(self) -> Root:
        """The record at the model's root."""
        return self.model.__dict__["_veneer"]

    def preparers(self) -> list[Any]:
        """The shared module and the deltas that want to act before each forward."""
        pool = [self.shared] if hasattr(self.shared, "prepare") else []
        return pool + [d for d in self.deltas.values() if type(d).prepare is not Delta.prepare]

    def every(self) -> dict[str, Delta]:
        """The deltas and the base tensors that train as they are, by site path."""
        return self.deltas | self.trained

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained tensors in a stable order, each once: sites, shared, hooks, then ``train``."""
        seen: set[int] = set()
        for key, p in self._all_parameters():
            if p.requires_grad and id(p) not in seen:
                seen.add(id(p))
                yield key, p

    def _all_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for path, d in self.deltas.items():
            yield from (
                [(f"{path}.value", d.parameter())]
                if isinstance(d, Written)
                else ((f"{path}.{n}", p) for n, p in d.named_parameters())
            )
        if self.shared is not None:
            yield from ((f"shared.{n}", p) for n, p in self.shared.named_parameters())
        for hook in self.hooks:
            yield from ((f"hook:{hook.name}.{n}", p) for n, p in hook.parameters().items())
        yield from ((f"train:{path}", d.parameter()) for path, d in self.trained.items())

    def parameters(self) -> list[nn.Parameter]:
        """The trained tensors."""
        return [p for _, p in self.named_parameters()]

    def parameter_count(self) -> int:
        """How many numbers train."""
        return sum(p.numel() for p in self.parameters())

    def pairs(self) -> Iterator[tuple[Site, nn.Parameter, nn.Parameter, float]]:
        """(site, A, B, scale) of every delta whose pair is two Parameters, ungated."""
        for d in self.deltas.values():
            pair = d.pair()
            if pair is not None and isinstance(pair.A, nn.Parameter) and isinstance(pair.B, nn.Parameter):
                yield d.site, pair.A, pair.B, pair.scale

    # -- on and off --------------------------------------------------------------------------------------------------

    @contextmanager
    def disabled(self):
        """The model as it was before this adapter, bit for bit."""
        if not self.keep_base:
            raise UserError(f"the adapter {self.name!r} was attached with keep_base=False: the base weights are gone")
        with self.root.switch.without(self.name):
            yield

    def remove(self, restore: bool) -> None:
        """Take everything off the model; ``restore`` puts base tensors that trained back to their old values."""
        for d in self.every().values():
            if isinstance(d, Written):
                d.release(restore)
            self.drop(d)
        root = self.root
        root.adapters.pop(self.name)
        if self.shared is not None:
            del self.model._modules["veneer_shared"]._modules[self.name]
            if not len(self.model._modules["veneer_shared"]):
                del self.model._modules["veneer_shared"]
        root.switch.change(
            names=tuple(n for n in root.switch.names if n != self.name),
            off=root.switch.off - {self.name},
            folded=root.switch.folded - {self.name},
        )
        for name, p in self.model.named_parameters():
            if name in self.flags and not root.adapters:
                p.requires_grad_(self.flags[name])
        if not root.adapters:
            root.close()
        self.deltas, self.trained = {}, {}

    def key(self, delta: Delta) -> str:
        """The name under which a delta hangs on its module."""
        site = delta.site
        part = site.role if site.rows is not None else (site.name or "")
        return f"{self.name}:{part}" if part else self.name

    def drop(self, delta: Delta) -> None:
        """Take one delta off its module."""
        adapted.swap_out(delta.site.module, self.key(delta))
        self.root.switch.change()

    def hang(self, path: str, delta: Delta, trained: bool = False) -> None:
        """Hang one delta on its module; ``trained`` marks a base tensor that trains as it is."""
        if isinstance(delta, Written):
            every = [w for a in self.root.adapters.values() for w in a.every().values() if isinstance(w, Written)]
            owners = [w for w in every if w.parameter() is delta.parameter()]
            delta.take(
                owners[0].home_dtype if owners else None, next((w for w in owners if w.adapter_name == self.name), None)
            )
        delta.train(delta.site.module.training)
        adapted.swap_in(delta.site.module, self.key(delta), delta, self.root.switch)
        (self.trained if trained else self.deltas)[path] = delta
        self.root.switch.change()

    # -- training ----------------------------------------------------------------------------------------------------

    @property
    def phases(self) -> list[Phase]:
        """The phases of the recipe; one when no method has its own."""
        return next((p for h in self.hooks if (p := h.phases())), [Phase("train")])

    def start_phase(self) -> None:
        """Let train what this phase trains."""
        phases = self.phases
        wanted = phases[self.phase].trainable
        if all(p.trainable is None for p in phases):
            return
        for d in self.deltas.values():
            for slot in d.slots():
                if slot.trained:
                    getattr(d, slot.name).requires_grad_(wanted is None or slot.name in wanted)

    def advance(self) -> bool:
        """End the current phase and take the next; False when it was the last."""
        phases = self.phases
        phase = phases[self.phase]
        for hook in self.hooks:
            plan = hook.on_phase_end(phase)
            if plan is not None:
                self.rebuild(plan)
        if self.phase + 1 >= len(phases):
            return False
        self.phase += 1
        self.start_phase()
        return True

    def rebuild(self, plan: Plan) -> None:
        """Build the deltas at the planned sites anew with other fields; a site planned None is dropped."""
        for path, fields in plan.items():
            old = self.deltas[path]
            self.drop(old)
            if fields is None:
                del self.deltas[path]
                continue
            new = type(old)(old.site, seed=self.seed, adapter=self.name, pool=old.pool, **(old.field_values() | fields))
            new.product = old.product
            self.hang(path, new)
        self.plan = self.plan | plan
        self.sites = [s for s in self.sites if s.path in self.deltas]


Adapter.built = Adapter


def base_fingerprint(model: nn.Module) -> str:
    """A hash of the base's tensors: names, shapes and 256 evenly spaced values of each, rounded to bf16.

    The same for one base in fp32, in bf16, and with its layers converted to another storage; adapters are left out.
    """
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if ".veneer." not in f".{path}." and "veneer_shared" not in path:
            own = module.__dict__.get("_veneer_digests") or digests(module)
            found |= {f"{path}.{n}": d for n, d in own.items()}
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:32]


def digests(module: nn.Module) -> dict[str, str]:
    """The digest of each parameter that the module itself holds."""
    out = {}
    for name, p in module.named_parameters(recurse=False):
        flat = p.detach().reshape(-1)
        at = torch.linspace(0, max(0, flat.numel() - 1), min(256, flat.numel()), dtype=torch.float64).long()
        values = flat[at.to(flat.device)].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()
        out[name] = hashlib.sha256(f"{tuple(p.shape)}".encode() + values).hexdigest()
    return out


def _twin(cache: Any) -> Any:
    """The base's own key-value cache beside the call's: it hangs on it and is reordered with it."""
    twin = cache.__dict__.get("veneer_base")
    if twin is None:
        twin = cache.veneer_base = copy.deepcopy(cache)
        reorder = cache.reorder_cache

        def both(rows: Tensor) -> None:
            reorder(rows)
            twin.reorder_cache(rows)

        cache.reorder_cache = both
    return twin
