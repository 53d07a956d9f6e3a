"""ConvLoRA: a kernel's change as the product of two matrices, composed before the convolution."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from veneer.core.adapted import Base
from veneer.core.delta import Delta, LoRAForm, Pair, Slot
from veneer.core.registry import method
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.chance import kaiming_uniform


@method("conv-lora", axis="delta", paper="arXiv:2504.11271", system=8, gives=("linear", "foldable", "frozen-base"))
class ConvLoRA(Delta):
    """A low-rank change of a convolution that costs nothing at inference.

    y = conv(x, W + ΔW) + b, ΔW = s·reshape(BA, (out, in, kh, kw)) with s = α/r (loralib's layer, used by DSCLoRA: Chai
    et al. 2025). The (out·kh) × (in·kw) product is read row by row. With B_a the rows o·kh + a of B, ΔW in the dense
    view is s·[B_0A | … | B_{kh−1}A]: its rank is at most min(out, r·kh²), and block a does not belong to kernel row a,
    because the view mixes channels with kernel positions.

    ======  ================  =========  ==============================  ======================
    tensor  shape             trained    start                           with ``form="two_conv"``
    ======  ================  =========  ==============================  ======================
    A       (r·kh, in·kw)     yes        U(±1/√(in·kw))                  (r, in·kh·kw)
    B       (out·kh, r·kh)    yes        0                               (out, r)
    ======  ================  =========  ==============================  ======================

    ``two_conv`` is PEFT's and LyCORIS's form, a kh × kw convolution to r channels and a 1 × 1 one, which is ``lora`` at
    a convolution; the two forms hold other numbers and must not be exchanged. Defaults: r = 2 and α = 2r from hints in
    the official code, which has r = 8 at the last convolution and the up-sampler: ``ranks=("conv_cat=8",
    "upsampler*=8")`` says so.

    Differences from the published layer: nothing is merged by ``eval()``, so no file holds ΔW twice; biases stay frozen
    (there they train: name them with ``train=``); its dropout, which is accepted and ignored, is left out. Groups and
    oblong kernels work, in = channels of one group, a Conv1d being 1 × k. Below fp32, where W + ΔW would lose what ΔW
    says, and above other adapters the change is a second convolution.
    """

    rank: Annotated[int, At(ge=1, doc="r: inner dimension over the kernel's height")] = 2
    ranks: Annotated[tuple[str, ...], At(doc="GLOB=r for layers of another rank, by path or its end; first fits")] = ()
    alpha: Annotated[float | None, At(gt=0, doc="numerator of the scale s; twice the rank when None")] = None
    form: Annotated[Literal["loralib", "two_conv"], At(doc="how the factors make the kernel")] = "loralib"

    layers = ("conv",)
    usual_sites = "conv"
    reasons = {"layers": "the form is a view of a kernel; at a 1×1 kernel or a linear layer it is lora"}

    @classmethod
    def places(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any]) -> list[Site]:
        """The selected convolutions; each of ``ranks`` must fit one."""
        chosen = super().places(model, sites, fields)
        for glob, r in map(_parsed, fields["ranks"]):
            if chosen and not any(s.named(glob) for s in chosen):
                raise UserError(f"conv-lora: ranks has '{glob}={r}', and no selected convolution's path fits {glob!r}")
        return chosen

    def slots(self) -> Iterable[Slot]:
        own = (r for glob, r in map(_parsed, self.ranks) if self.site.named(glob))
        self.rank = next(own, self.rank)
        out, inn = self.site.out_features, self.site.in_features
        kh = self._height()
        yield Slot("A", "factor_a", (self.rank * kh, inn // kh), kaiming_uniform)
        yield Slot("B", "factor_b", (out * kh, self.rank * kh))

    def build(self) -> None:
        self.scale = (2 * self.rank if self.alpha is None else self.alpha) / self.rank

    def pair(self) -> Pair | None:
        """The plain pair that the two convolutions are."""
        return Pair(self.A, self.B, self.scale) if self.form == "two_conv" else None

    def forward(self, x: Tensor, base: Base) -> Tensor:
        narrow = torch.finfo(self.compute_dtype(x)).bits < 32
        if base.links or narrow or self.form == "two_conv" or "_veneer_forward" in vars(self.site.module):
            return base.plus(x, self.update(x))
        return self.site.run(x, self.site.weight() + self.weight(), self.site.bias())

    def weight(self, W: Tensor | None = None) -> Tensor:
        return self.scale * (self.B @ self.A).view(self.site.out_features, self.site.in_features)

    def as_lora(self, W: Tensor, b: Tensor | None) -> LoRAForm:
        """The same change with B′ = [B_0 | … | B_{kh−1}] and A′ = blockdiag(A, …, A), of rank r·kh² or out."""
        out = self.site.out_features
        A, B = torch.block_diag(*[self.A] * self._height()), self.B.reshape(out, -1)
        if len(A) > out:
            A, B = B @ A, torch.eye(out, device=B.device)
        return LoRAForm(A, B, self.scale)

    def parameter_count(self) -> int:
        """r·kh·(in·kw + out·kh); r·(in·kh·kw + out) for ``two_conv``."""
        kh = self._height()
        return self.rank * kh * (self.site.in_features // kh + self.site.out_features * kh)

    def _height(self) -> int:
        """kh: 1 at a Conv1d and in the form of two convolutions, whose factors see the dense view."""
        kernel = self.site.module.kernel_size
        return kernel[0] if self.form == "loralib" and len(kernel) == 2 else 1


def _parsed(text: str) -> tuple[str, int]:
    """(glob, rank) of ``GLOB=r``."""
    glob, _, number = text.rpartition("=")
    if not glob or not number.isdecimal() or int(number) < 1:
        raise UserError(f"conv-lora: ranks holds {text!r}; a glob, = and a rank of at least 1 were expected: 'head*=8'")
    return glob, int(number)
