"""DSCLoRA: a larger network shows a small one its images and which places of its feature maps are alike."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.hook import Objective, Run, Schedule
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.models import architecture
from veneer.models.networks import load
from veneer.numerics.affinity import affinity_distance

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter


@method("dsclora", axis="objective", paper="arXiv:2504.11271", system=8, defaults="conv-lora")
class DSCLoRA(Objective):
    """Distillation for small networks that make images: the teacher's image, and the affinities of its features.

    L = L_rec + λ₂·mean|SR_S − SR_T| + λ₃·Σ_l mean|A_l^S − A_l^T| (Chai et al. 2025), L_rec the task's own loss (there
    mean|SR_S − HR|) and A_l the cosines between all places of feature map l: see ``numerics.affinity``.

    The teacher is a trained network of the same family with more channels: a folder (``teacher=``, see
    ``models.networks.save``) or any module, by ``guided_by``. It runs without gradients on the batch less its labels.
    ``maps`` names the modules whose outputs are compared; the default is the hint in the official code, the three
    convolutions of the first three blocks, the first two activated, by the names of the SPAN here.

    No λ was published. For images in [0, 1] λ₂ = 1 weighs the two images alike; λ₃ = 1e-3, because nine maps add up to
    some 0.5, and at λ₃ = 1, 25 times L_rec, a trained network here lost 0.2 dB. ``pool`` averages squares of that size
    first, which divides the work of the affinities by pool⁴. ``terms`` holds the three losses of the last batch. With
    both λ at 0 no teacher is needed and nothing runs.
    """

    teacher: Annotated[str, At(doc="folder of the trained network that teaches")] = ""
    image: Annotated[float, At(ge=0, doc="λ₂, weight of the distance to the teacher's image")] = 1.0
    affinity: Annotated[float, At(ge=0, doc="λ₃, weight of the distance between affinities")] = 1e-3
    maps: Annotated[tuple[str, ...], At(doc="globs: modules of the student whose outputs are compared")] = (
        "blocks.[0-2].a[12]",
        "blocks.[0-2].c3",
    )
    teacher_maps: Annotated[tuple[str, ...], At(doc="the same in the teacher; as in the student when empty")] = ()
    pool: Annotated[int, At(ge=1, doc="side of the squares that are averaged first", unit="positions")] = 1

    usual_sites = "conv"

    def on_attach(self, adapter: Adapter) -> None:
        self.network: nn.Module | None = None
        self.terms: dict[str, Tensor] = {}
        self._watched: list[Watched] = []

    def guided_by(self, network: nn.Module) -> None:
        """Learn from this network, which is frozen and put into eval mode."""
        self.network = network.eval().requires_grad_(False)

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        self.on_end()
        if not self.image and not self.affinity:
            return
        if self.network is None and not self.teacher:
            raise UserError(
                "dsclora learns from a larger trained network: give its folder, dsclora(teacher='…'), or call "
                "guided_by(network) on this hook"
            )
        if self.network is None:
            self.guided_by(load(self.teacher))
        if self.affinity:
            own, other = _named(adapter.model, self.maps), _named(self.network, self.teacher_maps or self.maps)
            if len(own) != len(other):
                raise UserError(f"dsclora: {len(own)} maps of the student and {len(other)} of the teacher")
            self._watched = [Watched(own, True), Watched(other, False)]

    def on_end(self) -> None:
        for watched in self._watched:
            watched.close()
        self._watched = []

    def loss(self, outputs: Any, batch: Any, run: Run) -> Tensor | None:
        if not self.image and not self.affinity:
            return None
        own = _image(outputs)
        shown = self._taught(batch, own)
        found = {"image": (own - shown.to(own.dtype)).abs().mean()}
        if self.affinity:
            found["affinity"] = sum(affinity_distance(*pair) for pair in self._maps())
        self.terms = {name: value.detach() for name, value in found.items()}
        if getattr(outputs, "loss", None) is not None:
            self.terms["reconstruction"] = outputs.loss.detach()
        return sum(getattr(self, name) * value for name, value in found.items() if getattr(self, name))

    @torch.no_grad()
    def _taught(self, batch: Any, like: Tensor) -> Tensor:
        """The teacher's image (B, 3, H, W) of a batch."""
        if not isinstance(batch, Mapping):
            raise UserError(f"dsclora takes batches by name (pixel_values, labels), not a {type(batch).__name__}")
        dtype = next(self.network.to(like.device).parameters()).dtype
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items() if k != "labels"}
        return _image(self.network(**inputs))

    def _maps(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of maps, the student's and the teacher's, pooled."""
        pairs = list(zip(*(watched.taken() for watched in self._watched)))
        for own, other in pairs:
            if own.shape[2:] != other.shape[2:]:
                sizes = f"{tuple(own.shape[2:])} in the student and {tuple(other.shape[2:])} in the teacher"
                raise UserError(f"dsclora: a map is {sizes}; name maps of one size")
        return [tuple(F.avg_pool2d(m, self.pool) for m in pair) if self.pool > 1 else pair for pair in pairs]


class Watched:
    """The outputs of some modules in the last forward pass with (or without) gradients: other passes do not count."""

    def __init__(self, modules: list[nn.Module], with_gradients: bool) -> None:
        self.with_gradients = with_gradients
        self.outputs: dict[int, Tensor] = {}
        self.handles = [m.register_forward_hook(self._keep) for m in modules]
        self.modules = modules

    def _keep(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if torch.is_grad_enabled() == self.with_gradients:
            self.outputs[id(module)] = output

    def taken(self) -> list[Tensor]:
        """The outputs in the order of the modules; they are let go."""
        outputs, self.outputs = self.outputs, {}
        if len(outputs) < len(self.modules):
            raise UserError("dsclora: a module that maps= names did not run in the forward pass")
        return [outputs[id(m)] for m in self.modules]

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


def _named(network: nn.Module, globs: tuple[str, ...]) -> list[nn.Module]:
    """The modules of these names in the network's order; raises UserError where a glob matches none."""
    paths = dict(architecture.named_modules(network))
    for glob in globs:
        if not any(fnmatchcase(path, glob) for path in paths):
            has = ", ".join(list(paths)[1:25])
            raise UserError(f"dsclora: the map {glob!r} matches no module of {type(network).__name__}; it has: {has}")
    return [m for path, m in paths.items() if any(fnmatchcase(path, g) for g in globs)]


def _image(outputs: Any) -> Tensor:
    """The image that a network gave: the output itself, or its ``image``, ``reconstruction`` or ``logits``."""
    if isinstance(outputs, Tensor):
        return outputs
    found = (getattr(outputs, name, None) for name in ("image", "reconstruction", "logits"))
    image = next((i for i in found if i is not None), None)
    if image is None:
        raise UserError(f"dsclora compares images, and {type(outputs).__name__} has none by a known name")
    return image
