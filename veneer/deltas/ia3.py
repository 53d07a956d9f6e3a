"""(IA)³: scale what a layer gives, or what it gets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from torch import Tensor

from veneer.core.adapted import Base
from veneer.core.delta import Delta, Slot
from veneer.core.registry import PeftMap, method
from veneer.fields import At
from veneer.numerics.chance import ones
from veneer.numerics.lowrank import gained


@method("ia3", axis="delta", paper="arXiv:2205.05638", system=0, gives=("linear", "foldable", "frozen-base"))
class IA3(Delta):
    """One trained number for each output of a layer, or for each input of those that end a feed-forward part.

    y = l ∘ (xWᵀ + b), so W′ = diag(l)·W and b′ = l ∘ b; at a feed-forward layer y = (x ∘ l)Wᵀ + b, W′ = W·diag(l)
    (Liu et al. 2022, §3.3).

    ======  ==================================  =========  =====
    tensor  shape                               trained    start
    ======  ==================================  =========  =====
    l       (out,), or (in,) at a feed-forward  yes        1
    ======  ==================================  =========  =====

    The paper adapts keys, values and the MLP's inner activation: ``sites=["k", "v", "down"]``, at rate 3e-3 with
    Adafactor. ``feedforward`` names the roles, or the ends of paths, of the layers whose input is scaled.

    At a convolution l sits on channels. In half precision y + y∘(l − 1) is taken, since l near 1 would be rounded away;
    PEFT multiplies in fp32 and rounds. Backward keeps the tensor that l multiplies.
    """

    feedforward: Annotated[tuple[str, ...], At(doc="roles or names of the layers whose input is scaled")] = ("down",)

    reasons = {"as_lora": "a row or column scaling of W has W's rank"}
    peft = PeftMap("IA3", fields={"feedforward": "feedforward_modules"}, keys={"l": "ia3_l"})

    def slots(self) -> Iterable[Slot]:
        inputs = self.site.module.in_channels if self.site.kind == "conv" else self.site.in_features
        yield Slot("l", "diagonal", (inputs if self.on_input else self.site.out_features,), ones)

    @property
    def on_input(self) -> bool:
        """Whether l scales the layer's input."""
        path = f".{self.site.module_path}"
        named = self.site.role in self.feedforward or any(path.endswith(f".{name}") for name in self.feedforward)
        return named and self.site.kind != "embedding"

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.on_input:
            return base(gained(x, self._spread()))
        return gained(base(x), self._spread())

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.on_input:
            return W * self.l[:, None], b if b is None else b * self.l
        if self.site.kind != "conv":
            return W * self.l, b
        m = self.site.module
        channels = self.l.view(m.groups, 1, -1, 1).expand(-1, m.out_channels // m.groups, -1, -1)
        return (W.view(m.out_channels, m.in_channels // m.groups, -1) * channels.flatten(0, 1)).view_as(W), b

    def weight(self, W: Tensor | None = None) -> Tensor:
        W = self.site.weight().float() if W is None else W
        return self.fold(W, None)[0] - W

    def parameter_count(self) -> int:
        """out, or the number of inputs (a convolution's channels) at a feed-forward layer."""
        return self.l.numel()

    def _spread(self) -> Tensor:
        """l that broadcasts over the layer's input or output."""
        return self.l.view(-1, *(1 for _ in self.site.module.kernel_size)) if self.site.kind == "conv" else self.l
