"""Deltas: the learned change at one site."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from veneer.core.context import current
from veneer.core.site import Kind, Site
from veneer.errors import UserError
from veneer.fields import Fields
from veneer.numerics import chance
from veneer.numerics.dropout import keep_mask
from veneer.numerics.fused import lowrank_linear

if TYPE_CHECKING:
    from veneer.core.adapted import Base
    from veneer.core.context import Context


class Slot(NamedTuple):
    """A tensor that a delta keeps: its name, role, shape, start, and whether it trains.

    Roles: factor_a factor_b core magnitude gate router head pool bias diagonal sparse. A frozen slot is drawn again
    from the seed when an adapter is loaded, unless an init filled it.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    start: Callable[[tuple[int, ...], torch.Generator], Tensor] = chance.zeros
    trained: bool = True


class Pair(NamedTuple):
    """A plain low-rank change ΔW = scale · B A with A (r, in) and B (out, r)."""

    A: Tensor
    B: Tensor
    scale: float


class Fused(NamedTuple):
    """What the fused product runs at a layer: a pair, and a factor (out,) on the rows of ``W + scale · B A``."""

    A: Tensor
    B: Tensor
    scale: float
    gain: Tensor | None = None


class LoRAForm(NamedTuple):
    """A change as plain LoRA on W: ΔW = scale · B A, and the change of the bias (out,) or None."""

    A: Tensor
    B: Tensor
    scale: float
    bias: Tensor | None = None


class Delta(Fields, nn.Module):
    """The learned change at one site; one instance a site.

    A subclass lists its tensors in ``slots`` and gives either ``pair`` (a plain pair, run by the fused product),
    or ``update`` and ``weight``, or ``forward`` and ``fold``. What it cannot do it declares below, with one sentence
    in ``reasons``.
    """

    axis: ClassVar[str] = "delta"
    layers: ClassVar[tuple[Kind, ...]] = ("linear", "conv", "embedding")
    starts_at_base: ClassVar[bool] = True
    folds: ClassVar[bool] = True
    replaces: ClassVar[bool] = False
    deterministic: ClassVar[bool] = True
    encoder_decoder: ClassVar[bool] = True
    reasons: ClassVar[dict[str, str]] = {}
    peft: ClassVar[Any] = None
    default_product: ClassVar[Any] = staticmethod(lowrank_linear)

    def __init__(
        self, site: Site, *, seed: int = 0, adapter: str = "default", pool: nn.Module | None = None, **fields: Any
    ) -> None:
        nn.Module.__init__(self)
        self.set_fields(fields)
        self.site, self.seed, self.adapter_name = site, seed, adapter
        self._pool = (pool,)
        self.product = type(self).default_product
        self.offset: Offset | None = None
        self.gate: Tensor | None = None
        self.scale = 1.0
        self.rebuilt: set[str] = set()
        for slot in self.slots():
            self.set_tensor(slot.name, slot.start(slot.shape, self.generator(slot.name)).float(), trained=slot.trained)
        self.rebuilt.update(s.name for s in self.slots() if not s.trained)
        self.build()

    # -- what a method says ------------------------------------------------------------------------------------------

    @classmethod
    def places(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any]) -> list[Site]:
        """The places this form takes among the selected sites: by default those of the kinds in ``layers``."""
        return [s for s in sites if s.kind in cls.layers]

    @classmethod
    def shared(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any], seed: int) -> nn.Module | None:
        """What all sites share, built once and kept at the model's root; reaches each instance as ``pool``."""
        return None

    def slots(self) -> Iterable[Slot]:
        """The tensors of this site."""
        return ()

    def build(self) -> None:
        """Derive the scale, indices and other buffers once the slots stand."""

    def update(self, x: Tensor) -> Tensor:
        """What is added to the base's output."""
        pair = self.pair()
        if pair is None or not self.site.factored():
            return self.site.run(self.drop(x), self.weight())
        A, B = self.cast(x, pair.A, pair.B)
        return self.site.lift(self.site.project(self.drop(x), A), B) * pair.scale

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """The adapted output; ``base(x)`` runs what lies beneath."""
        return base.plus(x, self.update(x))

    def weight(self, W: Tensor | None = None) -> Tensor:
        """ΔW (out, in) in fp32."""
        pair = self.pair()
        if pair is None:
            raise NotImplementedError(f"{self.name} gives neither pair nor weight")
        return pair.scale * (pair.B.float() @ pair.A.float())

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The adapted weight (out, in) and bias (out,)."""
        return W + self.weight(W), b

    def pair(self) -> Pair | None:
        """The plain pair that this delta is, or None."""
        return None

    def as_lora(self, W: Tensor, b: Tensor | None) -> LoRAForm | None:
        """This change as plain LoRA on W, exactly, or None."""
        pair = self.pair()
        return None if pair is None else LoRAForm(pair.A, pair.B, pair.scale)

    def members(self) -> Iterable[Delta]:
        """The deltas of the recipe's form that this one is: itself, or the experts it is made of."""
        return (self,)

    def prepare(self, ctx: Context) -> None:
        """Called once per forward of the whole model, before its blocks."""

    def parameter_count(self) -> int:
        """The number of trained parameters at this site by the method's formula."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    # -- what the core gives ---------------------------------------------------------------------------------------

    @property
    def pool(self) -> Any:
        """What this adapter's sites share."""
        return self._pool[0]

    def generator(self, *purpose: object) -> torch.Generator:
        """A CPU generator for one purpose at this site."""
        return chance.generator(self.seed, self.site.path, *purpose)

    def beneath(self) -> Base:
        """While this delta is built: what it will lie on, the adapters attached before included."""
        from veneer.core.adapted import beneath

        return beneath(self.site)

    def set_gate(self, value: Tensor | None) -> None:
        """Put a trained multiplier (r,) on the components, or take it off."""
        self._parameters.pop("gate", None)
        self.gate = None
        if value is not None:
            self.set_tensor("gate", value, trained=True)

    def set_tensor(self, name: str, value: Tensor, *, trained: bool = False) -> None:
        """Make or replace a tensor: a Parameter when it trains, else a buffer."""
        value = value.detach().to(self.site_device()).contiguous()
        for home in (self._parameters, self._buffers, self.__dict__):
            home.pop(name, None)
        if trained:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def site_device(self) -> torch.device:
        """Where the site's own tensors live."""
        tensors = (*self.site.module.parameters(), *self.site.module.buffers())
        return next((t.device for t in tensors), torch.device("cpu"))

    def fill(self, start: dict[str, Tensor]) -> None:
        """Put an init's tensors into the slots, by role; raises KeyError for a role that no slot has."""
        slots = {s.role: s for s in self.slots()}
        for role, value in start.items():
            slot = slots[role]
            self.set_tensor(slot.name, value.float(), trained=slot.trained)
            self.rebuilt.discard(slot.name)

    def freeze_offset(self) -> None:
        """Keep copies of the pair as it stands, to be subtracted: the start then equals the base."""
        pair = self.pair()
        assert pair is not None, "an offset needs a plain pair"
        self.offset = Offset(self.site, pair, self.adapter_name)

    def under(self) -> tuple[Delta | Offset, ...]:
        """This delta with the offset beneath it: the links that run at its site."""
        return (self,) if self.offset is None else (self.offset, self)

    def is_plain(self) -> bool:
        """Whether running this delta is adding its pair's product."""
        return self.plain_pair() is not None

    def plain_pair(self) -> Pair | None:
        """The pair, when running this delta is adding its product; asked once a forward, for it may be assembled."""
        if type(self).is_plain is not Delta.is_plain:
            return self.pair() if self.is_plain() else None
        return self.pair() if type(self).forward is Delta.forward and type(self).update is Delta.update else None

    def gated(self, A: Tensor) -> Tensor:
        """A with each row times its component's gate, where there is one."""
        return A if self.gate is None else A * self.gate[:, None]

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The type products are taken in: the input's, autocast's, or the layer's for integer input."""
        if x.is_floating_point():
            return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        return self.site.module.weight.dtype

    def cast(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors in the compute type of ``x``."""
        dtype = self.compute_dtype(x)
        return tuple(t.to(dtype) for t in tensors)

    def draw_seed(self) -> int:
        """The seed of this site's draw in the forward pass under way: the same when a block is recomputed."""
        ctx = current()
        return chance.derived_seed(self.seed, self.site.path, "draw", 0 if ctx is None else ctx.draw)

    def active_dropout(self) -> float:
        """The dropout probability that applies now."""
        return getattr(self, "dropout", 0.0) if self.training else 0.0

    def drop(self, x: Tensor) -> Tensor:
        """``x`` after this delta's dropout, drawn from the pass's seed; integer input passes through."""
        p = self.active_dropout()
        if p == 0.0 or not x.is_floating_point():
            return x
        mask = keep_mask(self.draw_seed(), (x[..., 0].numel(), x.shape[-1]), p, x.dtype, x.device)
        return x * mask.view(x.shape).div_(1 - p)

    def fused(self, base: Base) -> Fused | None:
        """What the fused product runs here, an offset beneath stacked in; None where this delta is more than that."""
        pair = self.plain_pair() if self.site.kind == "linear" and base.fusable else None
        if pair is None or not base.links:
            return pair and Fused(*pair)
        stackable = not self.active_dropout() and self.product is type(self).default_product
        return Fused(*self.stacked(pair)) if base.links == (self.offset,) and stackable else None

    def stacked(self, pair: Pair) -> Pair:
        """The pair with the offset beneath it as one pair."""
        (A, B, s), (A0, B0, s0) = pair, self.offset.pair()
        return Pair(torch.cat([A, A0]), torch.cat([B, B0 * (s0 / s)], dim=1), s)

    def run(self, x: Tensor, base: Base, *args: Any, **kwargs: Any) -> Any:
        """What the core calls: the fused product where this delta is a plain pair on a dense linear map."""
        fused = self.fused(base)
        pair = self.plain_pair() if fused is None and self.site.kind == "linear" else None
        if fused is None and pair is None:
            return self.forward(x, base, *args, **kwargs)
        p = self.active_dropout()
        seed = self.draw_seed() if p else None
        if fused is None:
            return base(x) + self.product(x, None, None, *pair, dropout=p, seed=seed)
        more = {} if fused.gain is None else {"gain": fused.gain}
        return self.product(x, base.source(), base.own_bias(), *fused[:3], dropout=p, seed=seed, **more)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Delta:
        """Move the tensors; small ones (vectors, gates, indices) keep their type."""

        def moved(t: Tensor) -> Tensor:
            if t.ndim >= 2 and t.is_floating_point():
                return fn(t)
            return t.to(fn(t.new_empty(0)).device)

        return super()._apply(moved, recurse)


class Offset(nn.Module):
    """A frozen −s·B₀A₀ beneath a delta: what a start moved out of W."""

    def __init__(self, site: Site, pair: Pair, adapter: str) -> None:
        super().__init__()
        self.site, self.scale, self.adapter_name = site, -pair.scale, adapter
        self.register_buffer("A", pair.A.detach().float().clone())
        self.register_buffer("B", pair.B.detach().float().clone())

    def pair(self) -> Pair:
        """The frozen pair; its scale is negative."""
        return Pair(self.A, self.B, self.scale)

    def weight(self, W: Tensor | None = None) -> Tensor:
        """−s·B₀A₀ (out, in)."""
        return self.scale * (self.B.float() @ self.A.float())

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight less what was moved out of it."""
        return W + self.weight(), b

    def run(self, x: Tensor, base: Base) -> Tensor:
        """The base's output less the frozen product."""
        dtype = x.dtype if x.is_floating_point() else self.site.module.weight.dtype
        if base.fusable and not base.links:
            return lowrank_linear(x, base.source(), base.own_bias(), self.A, self.B, self.scale)
        if not self.site.factored():
            return base(x) + self.site.run(x, self.weight())
        h = self.site.project(x, self.A.to(dtype))
        return base(x) + self.site.lift(h, self.B.to(dtype)) * self.scale


class Written(Delta):
    """A base tensor that trains as it is: the site is one tensor, an fp32 ``value`` stands for it in every forward.

    The layer computes with the value in its own precision; the base's own tensor stays untouched and is the undo
    record. The file holds the trained values, which come back bit for bit where differences would not. The second owner
    of a tied tensor shares the value of the first.
    """

    layers = ("parameter",)

    def base_tensor(self) -> nn.Parameter:
        """The base's own tensor; raises UserError where the layer stores none of that name."""
        p = self.site.module._parameters.get(self.site.name)
        if p is None:
            raise UserError(f"{self.site.path} cannot train as it is: the layer holds no such parameter")
        return p

    def begin(self, first: Written | None, beneath: Written | None) -> None:
        """Start from ``beneath``, what another adapter trained of it, or from the base; or share with ``first``."""
        self._first = (first,)
        if first is None:
            start = self.base_tensor() if beneath is None else beneath.parameter()
            self.set_tensor("value", start.detach().float().clone(), trained=True)

    def parameter(self) -> nn.Parameter:
        """The trained value."""
        return self.value if self._first[0] is None else self._first[0].value

    def weight(self, W: Tensor | None = None) -> Tensor:
        """The change since attaching."""
        return self.parameter().detach() - self.base_tensor().float()

    def parameter_count(self) -> int:
        """The tensor's size; of a tensor with two owners, at the first."""
        return self.base_tensor().numel() if self._first[0] is None else 0
