"""Full fine-tuning: the weights themselves."""

from __future__ import annotations

from typing import Annotated, Any

from torch import nn

from veneer.core.delta import Written
from veneer.core.registry import method
from veneer.core.site import Site, all_sites, parameter_site, stored
from veneer.errors import UserError
from veneer.fields import At
from veneer.models import architecture
from veneer.parts.selection import require_whole


@method("full", axis="delta", system=0, gives=("dense-gradient", "linear", "foldable"))
class Full(Written):
    """Every tensor of the selected layers trains as it is: the reference that other forms are compared with.

    y = xW′ᵀ + b′ with W′ and b′ unconstrained, from W and b on.

    =======  ==========================  =========  =================
    tensor   shape                       trained    start
    =======  ==========================  =========  =================
    W′       as the layer stores it      yes        the base's values
    b′       (out,), where there is one  yes        the base's values
    =======  ==========================  =========  =================

    No defaults of its own; rates are 1e-5 to 5e-5 for models above 100 M parameters, with or without decay 0.01–0.1.
    AdamW's decay pulls W to 0 and not to the base.

    The trained values are in fp32 and the layer computes in its own precision; the base's own stay, so disabling and
    detaching are exact. A tensor that several layers share (tied embeddings) trains once, counts once,
    and changes for all of them, whichever was selected. A projection that fuses several roles trains whole, so a
    selection of some of its roles is refused. With ``norms`` and sites="all" every parameter of the model trains.
    """

    norms: Annotated[bool, At(doc="train what belongs to no layer too: norms, free parameters")] = False

    layers = ("linear", "conv", "embedding")

    @classmethod
    def places(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any]) -> list[Site]:
        """A site for every tensor of the selected layers, and for every other layer that shares it."""
        owners = {name: group for group in architecture.tied(model) for name in group}
        names: dict[str, None] = {}
        for site in (s for s in sites if s.kind in cls.layers):
            if stored(site.module):
                raise UserError(f"full: {site.path} is stored quantised and only dense weights train; use lora over it")
            require_whole(site, sites, "full")
            for name, _ in site.module.named_parameters(recurse=False):
                path = f"{site.module_path}.{name}"
                names |= dict.fromkeys(owners.get(path, [path]))
        if fields["norms"]:
            layers = {f"{s.module_path}." for s in all_sites(model)}
            free = (n for n, _ in model.named_parameters() if ".veneer." not in f".{n}" and "veneer_shared" not in n)
            names |= dict.fromkeys(n for n in free if f"{n.rpartition('.')[0]}." not in layers)
        return [parameter_site(model, name) for name in names]
