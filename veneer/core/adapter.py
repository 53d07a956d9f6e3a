"""The adapter: all deltas of one recipe on one model, as a thing to train, switch, fold and carry away."""

from __future__ import annotations

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
from veneer.core.delta import Delta, Offset, Pair, Written
from veneer.core.hook import Hook, Phase, Plan
from veneer.core.recipe import Recipe
from veneer.core.site import Site, stored
from veneer.errors import UserError, nearest
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
        self._undo: dict[str, tuple[Tensor, Tensor | None]] | None = None

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
        """(site, A, B, scale) of every delta that is a plain, ungated pair of Parameters."""
        for d in self.deltas.values():
            pair = d.pair()
            if pair is not None and isinstance(pair.A, nn.Parameter) and isinstance(pair.B, nn.Parameter):
                yield d.site, pair.A, pair.B, pair.scale

    # -- its state as a value ----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Everything a file must hold: trained tensors, offsets, indices, scales; nothing that a seed gives again."""
        out: dict[str, Tensor] = {}
        for path, d in self.deltas.items():
            if isinstance(d, Written):
                if not any(v is d.parameter() for v in out.values()):
                    out[f"{path}.value"] = d.parameter()
                continue
            out |= {f"{path}.{n}": t for n, t in _saved(d).items()}
            if d.pair() is not None:
                out[f"{path}.scale"] = torch.tensor(d.scale, dtype=torch.float64)
            if d.offset is not None:
                out[f"{path}.offset.scale"] = torch.tensor(d.offset.scale, dtype=torch.float64)
        if self.shared is not None:
            out |= {f"shared.{n}": t for n, t in _saved(self.shared).items()}
        for hook in self.hooks:
            out |= {f"hook:{hook.name}.{n}": p for n, p in hook.parameters().items()}
        out |= {f"train:{path}": d.parameter() for path, d in self.trained.items()}
        return {k: v.detach() for k, v in out.items()}

    def load_state(self, state: dict[str, Tensor], strict: bool = True) -> None:
        """Take over a state; raises UserError for a tensor that is missing, left over or of the wrong shape."""
        left = dict(state)
        for path, d in self.deltas.items():
            own = {
                k.removeprefix(path + "."): left.pop(k)
                for k in list(left)
                if k.rpartition(path + ".")[0] == "" and k.startswith(path + ".") and _owner(k, self.deltas) == path
            }
            _load(d, path, own, strict)
        for prefix, module in (("shared.", self.shared),):
            own = {k.removeprefix(prefix): left.pop(k) for k in list(left) if k.startswith(prefix)}
            if module is not None:
                _load_module(module, prefix, own, strict)
        for hook in self.hooks:
            for n, p in hook.parameters().items():
                _copy(p, left.pop(f"hook:{hook.name}.{n}", None), f"hook:{hook.name}.{n}", strict)
        for path, d in self.trained.items():
            _copy(d.parameter(), left.pop(f"train:{path}", None), f"train:{path}", strict)
        if left and strict:
            raise UserError(
                f"the state holds tensors that this adapter has no place for: {', '.join(sorted(left)[:5])}"
            )

    def layout(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the trained tensors in the order of ``vector``."""
        return [(n, tuple(p.shape)) for n, p in self.named_parameters()]

    def vector(self) -> Tensor:
        """All trained tensors as one flat fp32 vector."""
        parts = [p.detach().reshape(-1).float() for p in self.parameters()]
        return torch.cat(parts) if parts else torch.zeros(0)

    @torch.no_grad()
    def set_vector(self, vector: Tensor) -> None:
        """Write a flat vector back into the trained tensors; raises UserError when its length differs."""
        if vector.numel() != self.parameter_count():
            raise UserError(f"the vector has {vector.numel()} numbers; this adapter trains {self.parameter_count()}")
        at = 0
        for p in self.parameters():
            p.copy_(vector[at : at + p.numel()].view_as(p))
            at += p.numel()

    @contextmanager
    def using(self, state: dict[str, Tensor]):
        """Run with another state of the trained tensors (keys as in ``state``; those left out stay)."""
        named = dict(self.state())
        before = {k: named[k].clone() for k in state if k in named}
        if len(before) < len(state):
            raise UserError(f"this adapter has no tensor {sorted(set(state) - set(named))[0]!r}")
        with torch.no_grad():
            for k in before:
                named[k].copy_(state[k])
        try:
            yield self
        finally:
            with torch.no_grad():
                for k, v in before.items():
                    named[k].copy_(v)

    # -- on and off --------------------------------------------------------------------------------------------------

    @contextmanager
    def disabled(self):
        """The model as it was before this adapter, bit for bit."""
        if not self.keep_base:
            raise UserError(f"the adapter {self.name!r} was attached with keep_base=False: the base weights are gone")
        if self._undo is not None:
            self.unfold()
            try:
                with self.root.switch.without(self.name):
                    yield
            finally:
                self.fold()
            return
        with self.root.switch.without(self.name):
            yield

    @torch.no_grad()
    def folded_weights(self) -> Iterator[tuple[Site, Tensor, Tensor | None]]:
        """(site, W', b') in fp32 for every site that folds, this adapter alone; raises where one cannot."""
        for d in self.deltas.values():
            if isinstance(d, Written):
                continue
            if not d.folds:
                why = d.reasons.get("folds", "it is not a linear map of the input")
                raise UserError(f"{d.name} cannot fold into the weights: {why}; save or serve the adapter instead")
            site = d.site
            if site.name is not None:
                p = site.weight()
                yield site, d.weight(p) if p is None else p.float() + d.weight(p), None
                continue
            W, b = site.weight().float(), site.bias()
            b = b if b is None else b.float()
            for link in d.under():
                W, b = link.fold(W, b)
            yield site, W, b

    @torch.no_grad()
    def fold(self) -> None:
        """Put the change into the weights; ``unfold`` takes it out again, bit for bit."""
        if self._undo is not None:
            raise UserError(f"the adapter {self.name!r} is folded already")
        self._check_foldable()
        undo: dict[str, tuple[Tensor, Tensor | None]] = {}
        new = list(self.folded_weights())
        for site, W, b in new:
            m, name = site.module, site.name or "weight"
            if site.module_path not in undo or site.name is not None:
                weight, bias = m._parameters.get(name), m._parameters.get("bias")
                key = site.path if site.name is not None else site.module_path
                undo[key] = (
                    None if weight is None else weight.detach().clone(),
                    None if bias is None else bias.detach().clone(),
                )
            if site.name is not None:
                _set_parameter(m, name, W, m._parameters.get(name))
                continue
            site.write(W)
            if b is not None:
                _set_bias(site, b)
        self._undo = undo
        self.root.switch.change(folded=self.root.switch.folded | {self.name})

    def _check_foldable(self) -> None:
        for group in architecture.tied(self.model):
            hit = [
                d.site.path
                for d in self.deltas.values()
                if not isinstance(d, Written) and f"{d.site.module_path}.weight" in group
            ]
            if hit:
                raise UserError(
                    f"folding {hit[0]} would change {' and '.join(group)}, which share one tensor: call veneer.untie(model) first"
                )
        for d in self.deltas.values():
            if stored(d.site.module) and d.site.kind == "linear":
                raise UserError(
                    f"{d.site.path} is stored quantised: folding would round the change away; export(format='merged') writes dense weights"
                )

    @torch.no_grad()
    def unfold(self) -> None:
        """Take the change out of the weights again."""
        if self._undo is None:
            raise UserError(f"the adapter {self.name!r} is not folded")
        done: set[str] = set()
        for d in self.deltas.values():
            site = d.site
            key = site.path if site.name is not None else site.module_path
            if key in done or key not in self._undo:
                continue
            done.add(key)
            weight, bias = self._undo[key]
            _restore(site.module, site.name or "weight", weight)
            if site.name is None:
                _restore(site.module, "bias", bias)
        self._undo = None
        self.root.switch.change(folded=self.root.switch.folded - {self.name})

    def bake(self) -> nn.Module:
        """Fold for good and take the adapter off; returns the model."""
        if self._undo is None:
            self.fold()
        self._undo = None
        self._remove(restore=False)
        return self.model

    def detach(self) -> nn.Module:
        """Take the adapter off: the model as it was, bit for bit (a converted base stays converted)."""
        if not self.keep_base:
            raise UserError(f"the adapter {self.name!r} was attached with keep_base=False: the base weights are gone")
        if self._undo is not None:
            self.unfold()
        self._remove(restore=True)
        return self.model

    def _remove(self, restore: bool) -> None:
        for d in self.every().values():
            if isinstance(d, Written):
                if restore:
                    d.release()
                else:
                    p = d.parameter()
                    p.data = p.data.to(d.home_dtype)
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

    def hang(self, delta: Delta) -> None:
        """Hang one delta on its module."""
        adapted.swap_in(delta.site.module, self.key(delta), delta, self.root.switch)

    # -- training ----------------------------------------------------------------------------------------------------

    @property
    def phases(self) -> list[Phase]:
        """The phases of the recipe; one when no method has its own."""
        return next((p for h in self.hooks if (p := h.phases())), [Phase("train")])

    def start_phase(self) -> None:
        """Let train what this phase trains."""
        wanted = self.phases[self.phase].trainable
        for d in self.deltas.values():
            for name, p in d.named_parameters():
                p.requires_grad_(wanted is None or name in wanted)

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
            new.product, new.training = old.product, old.training
            self.deltas[path] = new
            self.hang(new)
        self.plan = self.plan | plan
        self.sites = [s for s in self.sites if s.path in self.deltas]
        self.root.switch.change()

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser: the recipe's own, then one with every tensor these leave out."""
        groups = [g for h in self.hooks if hasattr(h, "groups") for g in (h.groups(self) or [])]
        taken = {id(p) for g in groups for p in g["params"]}
        rest = [(n, p) for n, p in self.named_parameters() if id(p) not in taken]
        if rest:
            groups.append({"params": [p for _, p in rest], "names": [n for n, _ in rest]})
        for g in groups:
            g.setdefault("rate", 1.0)
            g.setdefault("start_step", 0)
        return groups

    def add_parameters(self, params: dict[str, nn.Parameter], start_step: int = 0, **settings: Any) -> None:
        """Let new tensors train in the run under way, as a group of their own with its own clock."""
        if self.optimizer is not None and params:
            first = self.optimizer.param_groups[0]
            group = {k: v for k, v in first.items() if k not in ("params", "names")}
            group |= {"start_step": start_step, "names": list(params), "params": list(params.values())} | settings
            self.optimizer.add_param_group(group)

    def replace_parameter(self, delta: Delta, name: str, value: Tensor, keep: Any = None, dim: int = 0) -> nn.Parameter:
        """Put another tensor in a slot and carry the optimiser's state along.

        ``keep`` are the indices along ``dim`` that survive (None: all); state of rows beyond them starts at zero.
        """
        old = getattr(delta, name)
        delta.set_tensor(name, value, trained=True)
        new = getattr(delta, name)
        new.requires_grad_(old.requires_grad)
        if self.optimizer is None:
            return new
        for group in self.optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        state = self.optimizer.state.pop(old, None)
        if state is not None:
            self.optimizer.state[new] = {k: _carried(v, old, new, keep, dim) for k, v in state.items()}
        return new

    def training_state(self) -> dict[str, Any]:
        """What a resumed run needs besides ``state`` and the optimiser."""
        return {"phase": self.phase, "draws": self.root.draws, "hooks": {h.name: h.state_dict() for h in self.hooks}}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Take over what ``training_state`` gave."""
        self.phase, self.root.draws = state["phase"], state["draws"]
        for hook in self.hooks:
            hook.load_state_dict(state["hooks"].get(hook.name, {}))

    # -- words -------------------------------------------------------------------------------------------------------

    def description(self) -> dict[str, Any]:
        """What the file says of this adapter, ready for JSON."""
        from importlib.metadata import version

        part = self.recipe.part("delta")
        given = {} if part is None else part.fields
        fields = {
            path: {k: v for k, v in d.field_values().items() if v != given.get(k, getattr(type(d), k))}
            for path, d in self.deltas.items()
        }
        return {
            "format": 1,
            "veneer": version("veneer"),
            "torch": torch.__version__,
            "recipe": str(self.recipe),
            "seed": self.seed,
            "select": self.select,
            "sites": list(self.deltas),
            "fields": {path: f for path, f in fields.items() if f},
            "train": list(self.trained),
            "phase": self.phase,
            "finished": self.phase == len(self.phases) - 1,
            "base": self.base,
            "parameters": self.parameter_count(),
        }

    def table(self) -> list[dict[str, Any]]:
        """One row per kind of site: role, form, shape, count, trained parameters and bytes."""
        rows: dict[tuple, dict[str, Any]] = {}
        for d in self.every().values():
            shape = f"{d.site.out_features}×{d.site.in_features}" if d.site.name is None else "tensor"
            rank = getattr(d, "rank", None)
            row = rows.setdefault(
                (d.site.role, d.name or "base tensor", shape, rank),
                {
                    "role": d.site.role,
                    "form": d.name or "base tensor",
                    "shape": shape,
                    "rank": rank,
                    "sites": 0,
                    "parameters": 0,
                },
            )
            row["sites"] += 1
            row["parameters"] += d.parameter_count()
        return list(rows.values())

    def __repr__(self) -> str:
        total = sum(p.numel() for p in self.model.parameters())
        own = self.parameter_count()
        lines = [f"{self.recipe} as {self.name!r}: {own:,} parameters train, {own / max(1, total):.2%} of {total:,}"]
        lines += [
            f"  {r['role']:<6} {r['form']:<12} {r['shape']:>12}  rank {r['rank'] or '–':>4}  × {r['sites']:<4} {r['parameters']:>12,}"
            for r in self.table()
        ]
        lines.append(f"  fp32 in memory: {4 * own / 2**20:.1f} MiB")
        return "\n".join([*lines, *(f"  note: {n}" for n in self.recipe.notes)])


Adapter.built = Adapter


def base_fingerprint(model: nn.Module) -> str:
    """A hash of the base's tensors: names, shapes and 256 evenly spaced values of each, rounded to bf16.

    The same for one base in fp32 and bf16; adapters are left out.
    """
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        if ".veneer." in f".{name}" or "veneer_shared" in name:
            continue
        flat = p.detach().reshape(-1)
        at = torch.linspace(0, max(0, flat.numel() - 1), min(256, flat.numel()), dtype=torch.float64).long()
        values = flat[at.to(flat.device)].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()
        digest.update(f"{name}{tuple(p.shape)}".encode() + values)
    return digest.hexdigest()[:32]


def _owner(key: str, deltas: dict[str, Delta]) -> str:
    """The site a state's key belongs to: the longest site path that begins it."""
    return max((p for p in deltas if key.startswith(p + ".")), key=len, default="")


def _saved(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, less what a seed gives again."""
    rebuilt = getattr(module, "rebuilt", set())
    out = dict(module.named_parameters())
    for prefix, m in module.named_modules():
        skip = m._non_persistent_buffers_set | getattr(m, "rebuilt", set())
        out |= {f"{prefix}.{n}" if prefix else n: b for n, b in m._buffers.items() if b is not None and n not in skip}
    return {n: t for n, t in out.items() if n not in rebuilt}


def _load(delta: Delta, path: str, own: dict[str, Tensor], strict: bool) -> None:
    if isinstance(delta, Written):
        value = own.pop("value", None)
        if value is not None:
            _copy(delta.parameter(), value, f"{path}.value", strict)
        return
    if "scale" in own:
        delta.scale = float(own.pop("scale"))
    if "offset.A" in own:
        pair = Pair(own.pop("offset.A"), own.pop("offset.B"), -float(own.pop("offset.scale")))
        delta.offset = Offset(delta.site, pair).to(delta.site_device())
    if "gate" in own and delta.gate is None:
        delta.set_tensor("gate", own["gate"], trained=True)
    elif "gate" not in own and delta.gate is not None:
        delattr(delta, "gate")
        delta.gate = None
    for name in [n for n in own if "." not in n and hasattr(delta, n)]:
        value = own.pop(name)
        old = getattr(delta, name)
        if old.ndim != value.ndim:
            raise UserError(f"{path}.{name} has shape {tuple(value.shape)}; this adapter's has {tuple(old.shape)}")
        if old.shape == value.shape:
            _copy(old, value, f"{path}.{name}", strict)
        else:
            _check_resized(delta, path, name, old, value)
            delta.set_tensor(name, value, trained=isinstance(old, nn.Parameter))
        delta.rebuilt.discard(name)
        own.setdefault("", value)
    done = own.pop("", None) is not None
    nested = {n: v for n, v in own.items() if "." in n}
    if nested:
        _load_module(delta, path + ".", own, strict, only=set(nested))
    elif own and strict:
        raise UserError(f"{path} has no tensor {sorted(own)[0]!r}")
    elif strict and not done and _saved(delta):
        raise UserError(f"the state holds nothing for {path}")


def _check_resized(delta: Delta, path: str, name: str, old: Tensor, value: Tensor) -> None:
    """Ranks may differ from the recipe's (pruned, grown); the layer's own dimensions may not."""
    fixed = {delta.site.out_features, delta.site.in_features}
    for a, b in zip(old.shape, value.shape):
        if a != b and (a in fixed or b in fixed) and a != getattr(delta, "rank", None):
            raise UserError(
                f"{path}.{name} has shape {tuple(value.shape)}; this model's layer wants {tuple(old.shape)}"
            )
    if hasattr(delta, "rank"):
        delta.rank = next(b for a, b in zip(old.shape, value.shape) if a != b)


def _load_module(
    module: nn.Module, prefix: str, own: dict[str, Tensor], strict: bool, only: set[str] | None = None
) -> None:
    known = _saved(module)
    for name, value in own.items():
        if name not in known and strict:
            raise UserError(f"there is no tensor {prefix}{name}{nearest(name, known)}")
        if name in known:
            _copy(known[name], value, prefix + name, strict)
    missing = [n for n in known if n not in own and (only is None or n in only)]
    if missing and strict:
        raise UserError(f"the state lacks {prefix}{missing[0]}")


@torch.no_grad()
def _copy(target: Tensor, value: Tensor | None, name: str, strict: bool) -> None:
    if value is None:
        if strict:
            raise UserError(f"the state lacks {name}")
        return
    if target.shape != value.shape:
        raise UserError(f"{name} has shape {tuple(value.shape)}; this adapter's has {tuple(target.shape)}")
    target.copy_(value)


def _carried(value: Any, old: Tensor, new: Tensor, keep: Any, dim: int) -> Any:
    """An optimiser's tensor of the old shape, cut to what was kept and padded with zeros."""
    if not isinstance(value, Tensor) or value.shape != old.shape:
        return value
    kept = value if keep is None else value.index_select(dim, torch.as_tensor(keep, device=value.device))
    out = value.new_zeros(new.shape)
    out.narrow(dim, 0, kept.shape[dim]).copy_(kept)
    return out


def _set_parameter(module: nn.Module, name: str, value: Tensor, old: nn.Parameter | None) -> None:
    if old is None:
        dtype = next((p.dtype for p in module.parameters(recurse=False)), value.dtype)
        module._parameters[name] = nn.Parameter(value.to(dtype), requires_grad=False)
    else:
        old.data = value.to(old.dtype)


def _set_bias(site: Site, b: Tensor) -> None:
    m = site.module
    if m._parameters.get("bias") is None:
        rows = m.weight.shape[1 if site.transposed else 0]
        full = torch.zeros(rows, dtype=m.weight.dtype, device=m.weight.device)
        m._parameters["bias"] = nn.Parameter(full, requires_grad=False)
    with torch.no_grad():
        site.bias().copy_(b)


def _restore(module: nn.Module, name: str, value: Tensor | None) -> None:
    if value is None:
        module._parameters[name] = None
    elif module._parameters.get(name) is not None:
        module._parameters[name].data = value
