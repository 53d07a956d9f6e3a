"""BitFit: the biases alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from veneer.core.delta import Delta, LoRAForm, Slot
from veneer.core.registry import PeftMap, method
from veneer.core.site import Site, parameter_site
from veneer.errors import UserError
from veneer.fields import At
from veneer.parts.selection import require_whole


@method("bitfit", axis="delta", paper="arXiv:2106.10199", system=0, gives=("linear", "foldable", "frozen-base"))
class BitFit(Delta):
    """Only the biases of the selected layers train.

    y = xWᵀ + b + δ (Ben Zaken et al. 2022); where the layer has no bias, b = 0.

    =======  =======  =========  ======
    tensor   shape    trained    start
    =======  =======  =========  ======
    δ        (out,)   yes        0
    =======  =======  =========  ======

    No defaults of its own; rates are 1e-3 to 1e-2, five to ten times those of full tuning. The paper trains the biases
    of norms too: name them with ``train=``.

    The change is kept apart from b, which stays as it was, and decay pulls to the base. Models of the Llama family have
    no biases: ``missing="create"`` gives each selected layer one, which folding writes into the layer,
    ``missing="error"`` refuses, ``missing="skip"`` leaves such layers out. A fused projection has one bias and trains
    it whole, so a selection of some of its roles is refused. Embeddings have none.
    """

    missing: Annotated[
        Literal["create", "error", "skip"], At(doc="what to do at a layer without a bias: add a zero one, refuse, skip")
    ] = "create"

    usual_rate = 2e-3
    peft = PeftMap("BEFT", keys={"delta": "beft_bias"})
    layers = ("linear", "conv")
    reasons = {"as_lora": "the change does not depend on the input"}

    @classmethod
    def places(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any]) -> list[Site]:
        """The bias of every selected layer as a site of its own."""
        paths: dict[str, None] = {}
        for site in (s for s in sites if s.kind in cls.layers):
            require_whole(site, sites, "bitfit")
            if site.bias() is None and fields["missing"] == "error":
                raise UserError(
                    f"bitfit: {site.path} has no bias; write bitfit(missing='create') to give it one, "
                    "or missing='skip' to leave such layers out"
                )
            if site.bias() is not None or fields["missing"] == "create":
                paths[f"{site.module_path}.bias"] = None
        return [parameter_site(model, path) for path in paths]

    def slots(self) -> Iterable[Slot]:
        yield Slot("delta", "bias", (self._out(),))

    def weight(self, W: Tensor | None = None) -> Tensor:
        """δ (out,)."""
        return self.delta

    def as_lora(self, W: Tensor, b: Tensor | None) -> LoRAForm | None:
        return None

    def parameter_count(self) -> int:
        """out."""
        return self._out()

    def _out(self) -> int:
        b = self.site.weight()
        return len(b) if b is not None else Site("", self.site.module, "linear").weight().shape[0]
