"""Bottleneck adapters: a small network after, or beside, parts of each block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.adapted import Base
from veneer.core.delta import Delta, LoRAForm, Slot
from veneer.core.registry import method
from veneer.core.site import Site, all_sites, module_site
from veneer.errors import UserError
from veneer.fields import At
from veneer.models import architecture
from veneer.numerics import chance

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": F.tanh, "identity": lambda h: h}
AFTER = {"pfeiffer": ("down",), "houlsby": ("o", "down")}  # placement → roles of the layers whose output it takes


@method("adapter", axis="delta", paper="arXiv:1902.00751", system=0, gives=("frozen-base",))
class Bottleneck(Delta):
    """Down to m dimensions, a non-linearity, up again, and a skip connection around it.

    h′ = h + c·(φ(hDᵀ + b_D)Uᵀ + b_U) with h the output of a sub-layer before it joins the residual stream (Houlsby et
    al. 2019, fig. 2); parallel: y′ = y + c·(φ(xDᵀ + b_D)Uᵀ + b_U) with x the sub-layer's input (He et al. 2022).

    ======  ========  =========  ==================  =====================  ==========================
    tensor  shape     trained    start               ``start="bert"``       ``start="houlsby"``
    ======  ========  =========  ==================  =====================  ==========================
    D       (m, d)    yes        U(−1/√d, 1/√d)      N(0, 0.02²)            N(0, 0.01²) cut at 2σ
    b_D     (m,)      yes        0                   0                      0
    U       (d, m)    yes        0                   N(0, 0.02²)            N(0, 0.01²) cut at 2σ
    b_U     (d,)      yes        0                   0                      0
    ======  ========  =========  ==================  =====================  ==========================

    ``placement`` within every block that holds a selected layer: ``pfeiffer`` after the MLP, ``houlsby`` after the
    attention and the MLP, ``parallel`` beside the MLP; ``layer`` takes each selected linear layer's own output.
    Defaults: Pfeiffer's placement, m = d/16, ReLU, c = 1, and a start at the base; He et al. have c = 4 in parallel.
    Starts are those of the adapters library, whose own default is ``bert``, off the base.

    After the MLP means after its last linear layer, ahead of its dropout; the library's layer norms around an adapter
    are left out. With φ = identity it folds: W′ = (I + c·UD)W. Backward keeps h and the middle.
    """

    rank: Annotated[int | None, At(ge=1, doc="width m of the bottleneck; d/16 when None")] = None
    placement: Annotated[
        Literal["pfeiffer", "houlsby", "parallel", "layer"], At(doc="after the MLP, attention too, beside, or anywhere")
    ] = "pfeiffer"
    activation: Annotated[Literal["relu", "gelu", "silu", "tanh", "identity"], At(doc="φ")] = "relu"
    scaling: Annotated[float, At(gt=0, doc="c")] = 1.0
    start: Annotated[Literal["zero", "bert", "houlsby"], At(doc="how D and U start")] = "zero"

    layers = ("linear", "module")
    folds = False
    reasons = {"folds": "the bottleneck is not linear", "as_lora": "the bottleneck is not linear"}

    @classmethod
    def places(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any]) -> list[Site]:
        """The layers, or MLPs, of the selected blocks that the placement means."""
        if fields["placement"] == "layer":
            return [s for s in sites if s.kind == "linear"]
        blocks = [path for path, _ in architecture.blocks(model) if any(s.path.startswith(f"{path}.") for s in sites)]
        if fields["placement"] == "parallel":
            parts = [p for p in architecture.mlp_modules(model) if _within(p.path, blocks)]
            found = [module_site(model, p.path, {r: inner.module for r, inner in p.layers.items()}) for p in parts]
        else:
            roles = AFTER[fields["placement"]]
            found = [s for s in all_sites(model) if s.role in roles and s.kind == "linear" and _within(s.path, blocks)]
        if not found:
            raise UserError(
                f"adapter: the selected layers lie in no block with an MLP to put one at (placement="
                f"{fields['placement']!r}); placement='layer' puts one after each selected linear layer"
            )
        return found

    def slots(self) -> Iterable[Slot]:
        m, inner, outer = self._sizes()
        first, second = {
            "zero": (chance.kaiming_uniform, chance.zeros),
            "bert": (chance.normal(0.02),) * 2,
            "houlsby": (_truncated,) * 2,
        }[self.start]
        yield Slot("D", "factor_a", (m, inner), first)
        yield Slot("b_D", "bias", (m,))
        yield Slot("U", "factor_b", (outer, m), second)
        yield Slot("b_U", "bias", (outer,))

    def build(self) -> None:
        self.scale = self.scaling
        self.folds = self.activation == "identity" and self.site.kind == "linear"

    def forward(self, x: Tensor | None, base: Base, *args: Any, **kwargs: Any) -> Any:
        out = base(x, *args, **kwargs)
        y = out if isinstance(out, Tensor) else out[0]
        h = y
        if self.placement == "parallel":
            h = x if x is not None else next(iter(kwargs.values()))
        D, b_D, U, b_U = self.cast(h, self.D, self.b_D, self.U * self.scale, self.b_U * self.scale)
        y = y + F.linear(ACTIVATIONS[self.activation](F.linear(h, D, b_D)), U, b_U)
        return y if isinstance(out, Tensor) else (y, *out[1:])

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change = self.as_lora(W, b)
        if change is None:
            raise UserError(f"adapter cannot fold: {self.reasons['folds']}")
        return W + change.scale * change.B @ change.A, change.bias if b is None else b + change.bias

    def weight(self, W: Tensor | None = None) -> Tensor:
        W = self.site.weight().float() if W is None else W
        return self.fold(W, None)[0] - W

    def as_lora(self, W: Tensor, b: Tensor | None) -> LoRAForm | None:
        if not self.folds:
            return None
        middle = self.b_D if b is None else self.b_D + self.D @ b
        return LoRAForm(self.D @ W, self.U, self.scale, self.scale * (self.U @ middle + self.b_U))

    def parameter_count(self) -> int:
        """m·(d_in + d_out + 1) + d_out, which is 2dm + d + m."""
        m, inner, outer = self._sizes()
        return m * (inner + outer + 1) + outer

    def _sizes(self) -> tuple[int, int, int]:
        """(m, d of what comes in, d of what goes out)."""
        site = self.site
        outer = site.parts["down"].out_features if site.kind == "module" else site.out_features
        inner = site.parts["up"].in_features if site.kind == "module" else outer
        return self.rank or max(1, outer // 16), inner, outer


def _within(path: str, blocks: list[str]) -> bool:
    return any(path.startswith(f"{block}.") for block in blocks)


def _truncated(shape: tuple[int, ...], generator: Any) -> Tensor:
    return nn.init.trunc_normal_(chance.zeros(shape, generator), std=0.01, a=-0.02, b=0.02, generator=generator)
