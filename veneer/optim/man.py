"""MAN: blocks that learn apart, each with a slow copy of the next one's first layer in view."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.hook import Optim, Run, Schedule
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.models import architecture
from veneer.numerics import chance
from veneer.parts.layerwise import as_it_is
from veneer.parts.trainability import remove_parameters
from veneer.parts.trunk import hidden, standing_in, unchecked

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter


@dataclass
class Border:
    """What stands between a local block and the next one, ``door`` being the next one's first layer u.

    ``places`` are the tensors of u that train, (module, leaf) each; ``slow`` and ``own`` stand for them in E and in L.
    ``A`` (r, d) and ``B`` (d, r) are what the local loss's head has of its own.
    """

    door: nn.Module
    places: dict[str, tuple[nn.Module, str]]
    slow: dict[str, Tensor] = field(default_factory=dict)
    own: dict[str, nn.Parameter] = field(default_factory=dict)
    A: nn.Parameter | None = None
    B: nn.Parameter | None = None

    def now(self) -> dict[str, Tensor]:
        """The tensors of u that train, as they stand."""
        return {name: module._parameters[leaf] for name, (module, leaf) in self.places.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """What trains here, by name."""
        head = {} if self.A is None or self.B is None else {"head.A": self.A, "head.B": self.B}
        return {f"layer.{n}": p for n, p in self.own.items()} | head

    @contextmanager
    def holding(self, tensors: dict[str, Tensor]) -> Iterator[None]:
        """Within it u computes with these tensors."""
        before = self.now()
        try:
            for name, (module, leaf) in self.places.items():
                module._parameters[leaf] = tensors[name]
            yield
        finally:
            for name, (module, leaf) in self.places.items():
                module._parameters[leaf] = before[name]


@method("man", axis="optim", paper="arXiv:2407.05623", system=144, defaults="lora")
class MAN(Optim):
    """K local blocks of consecutive layers with a loss each; no gradient crosses a border, and one block is alive.

    x_k = f_k(sg[x_{k−1}]); z_k = ½(L_k(x_k) + E_k(x_k)), u_{k+1} being the first layer of the next block: E_k has a
    moving average of its tensors, θ(E) ← μθ(E) + (1 − μ)θ(u) once a step before the optimiser moves u, and passes
    gradient to x_k; L_k has tensors that train with block k. ℓ_k = λ_k · the task's loss of head(z_k + B_k A_k z_k);
    the last block has the task's own loss (Su et al. 2024). Only what belongs to block k gets gradient from ℓ_k: what
    runs before the layers (embeddings) goes with the first block, what runs after them with the last.

    ==========  ======================  ========================  =============================
    tensor      shape                   trained                   start
    ==========  ======================  ========================  =============================
    E_k         of the form's in u      no, a moving average      those of u_{k+1}
    L_k         of the form's in u      yes, with block k         those of u_{k+1}
    A_k, B_k    (r, d), (d, r)          yes, with block k         U(±1/√d), 0
    ==========  ======================  ========================  =============================

    They exist while a run goes on and then vanish; frozen weights are u's own. Defaults: μ = 0.995 (the official
    script's own default, 1, never moves E); K = 2, split evenly by layers; λ from ``first`` to ``last`` in equal steps
    over the borders, both 1 (CIFAR's scripts: 0.5 → 0; ImageNet's: 0.75).

    Otherwise than there: the mean of L and E in place of their sum, since a residual layer passes x on in both
    (``mix="sum"`` has the sum). The head of a local loss is the model's own, norm included, which those losses do not
    move, with a low-rank change before it: for r ≥ classes as much as a head of its own, and cheap with a vocabulary.
    Layers are not checkpointed, as few are alive. E and L start at u (there all convolutions are drawn anew after
    copying). There is no decoder of the input image, and no contrastive loss. Objectives act in each local loss.
    ``clip`` bounds each block's gradient by itself; give the run ``clip=0`` with it, or that looks at all together.
    """

    encoder_decoder = False
    reasons = {"encoder_decoder": "the decoder's layers read the encoder's output beside the layer before"}

    blocks: Annotated[int, At(ge=1, doc="K, local blocks")] = 2
    momentum: Annotated[float, At(ge=0, le=1, doc="μ of the moving average")] = 0.995
    auxiliary: Annotated[
        Literal["both", "slow", "own", "none"], At(doc="what is between block and local head: L and E, E, L, nothing")
    ] = "both"
    mix: Annotated[Literal["mean", "sum"], At(doc="how L and E are put together")] = "mean"
    head_rank: Annotated[int, At(ge=0, doc="r, of each local head's own change")] = 16
    first: Annotated[float, At(ge=0, doc="λ of the first local loss")] = 1.0
    last: Annotated[float, At(ge=0, doc="λ of the last local loss before the head's")] = 1.0
    clip: Annotated[float | None, At(gt=0, doc="bound on the gradient's norm, of each block apart")] = None

    def on_attach(self, adapter: Adapter) -> None:
        self.layers_of = [b for _, b in architecture.blocks(adapter.model)]
        self.borders: list[Border] = []
        self.owner: dict[int, int] | None = None
        count, config = len(self.layers_of), architecture.text_config(adapter.model)
        if count < self.blocks or getattr(config, "is_encoder_decoder", False):
            raise UserError(
                f"man: {type(adapter.model).__name__} has {count} layers in one stack to make {self.blocks} local "
                "blocks of; give fewer blocks, or a model whose layers stand one after the other"
            )
        apart = {"ranks": "changes tensors in mid-run that man copies", "mixture": "may run all layers once more"}
        for axis, why in apart.items():
            for part in adapter.recipe.on(axis):
                raise UserError(f"man runs some layers at a time, and {part.method.name} {why}: leave one of them out")
        if adapter.shared is not None and any(p.requires_grad for p in adapter.shared.parameters()):
            raise UserError(
                f"man trains each block by its own loss, and {adapter.recipe.part('delta').method.name} shares "
                "trained tensors between blocks: take a form that shares none"
            )
        self.bounds = [round(k * count / self.blocks) for k in range(self.blocks + 1)]

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        remove_parameters(adapter, self.parameters().values())
        trained = {id(p) for p in adapter.parameters()}
        self.borders, self.owner = [], None
        for k, at in enumerate(self.bounds[1:-1]):
            border = self._border(self.layers_of[at], trained)
            if self.head_rank:
                shape, g = (self.head_rank, self._width()), chance.generator(self.seed, "man", k)
                like = next(self.layers_of[at].parameters())
                border.A = nn.Parameter(chance.kaiming_uniform(shape, g).to(like.device))
                border.B = nn.Parameter(torch.zeros(shape[::-1], device=like.device))
            self.borders.append(border)
        adapter.add_parameters({f"hook:{self.name}.{n}": p for n, p in self.parameters().items()}, rate=1.0)

    def _border(self, door: nn.Module, trained: set[int]) -> Border:
        border = Border(door, {})
        for path, module in door.named_modules():
            for leaf, p in module._parameters.items():
                if p is not None and id(p) in trained:
                    border.places[f"{path}.{leaf}"] = (module, leaf)
        for name, p in border.now().items():
            if self.auxiliary in ("both", "slow"):
                border.slow[name] = p.detach().clone()
            if self.auxiliary in ("both", "own"):
                border.own[name] = nn.Parameter(p.detach().clone())
        return border

    def _width(self) -> int:
        """d of the hidden states."""
        model, head = self.adapter.model, architecture.head(self.adapter.model)
        sizes = None if head is None else architecture.features(head)
        d = architecture.hidden_size(model) or (sizes and sizes[1])
        if not d:
            raise UserError(f"man: nothing says how wide {type(model).__name__}'s layers are; give head_rank=0")
        return d

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"{k}.{n}": p for k, b in enumerate(self.borders) for n, p in b.parameters().items()}

    # -- a step

    def weight(self, k: int) -> float:
        """λ of local block ``k``; 1 for the last, whose loss is the task's."""
        span = max(1, self.blocks - 2)
        return 1.0 if k == self.blocks - 1 else self.first + (self.last - self.first) * k / span

    def micro_step(self, run: Run, batch: Any) -> Tensor:
        """Block by block, forward and backward; gives the last one's loss."""
        if self.owner is None:
            self._survey(run, batch)
        state: Any = None
        for k in range(self.blocks):
            with self._alone(k), self._local(k, state) as left:
                loss = run.loss(batch)
                if loss.requires_grad:
                    run.backward(loss * self.weight(k))
            state = left[0] if left else None
        return loss

    def after_backward(self, step: int) -> None:
        if self.clip is None or self.owner is None:
            return
        for k in range(self.blocks):
            nn.utils.clip_grad_norm_([p for p in self.adapter.parameters() if self.owner.get(id(p)) == k], self.clip)

    @torch.no_grad()
    def before_optimizer(self, step: int) -> None:
        for border in self.borders:
            now = border.now()
            for name, slow in border.slow.items():
                slow.lerp_(now[name].to(slow.dtype), 1 - self.momentum)

    @contextmanager
    def _alone(self, k: int) -> Iterator[None]:
        """Within it only what belongs to block ``k`` trains."""
        others = [p for p in self.adapter.parameters() if self.owner.get(id(p), self.blocks - 1) != k]
        for p in others:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in others:
                p.requires_grad_(True)

    @contextmanager
    def _local(self, k: int, state: Any) -> Iterator[list[Any]]:
        """Within it the model is block ``k`` behind ``state``, with its auxiliary network; the list gets x_k."""
        start, end = self.bounds[k], self.bounds[k + 1]
        left: list[Any] = []
        forwards: dict[nn.Module, Callable[..., Any]] = {b: lambda *a, **n: state for b in self.layers_of[:start]}
        if end < len(self.layers_of):
            border, own = self.borders[k], self.borders[k].door.forward

            def auxiliary(*given: Any, **named: Any) -> Any:
                x = given[0] if given else named["hidden_states"]
                named |= dict.fromkeys({"past_key_values"} & named.keys())  # it runs twice on the same tokens
                if not left:  # an objective may run the model again
                    left.append(self._shaped(x.detach()))
                return self._shaped(self._seen(border, x, lambda: hidden(own(*given, **named))))

            forwards[border.door] = auxiliary
            forwards |= dict.fromkeys(self.layers_of[end + 1 :], self._pass_on)
        with unchecked(self.layers_of), standing_in(forwards):
            yield left

    def _seen(self, border: Border, x: Tensor, u: Callable[[], Tensor]) -> Tensor:
        """z_k + B_k A_k z_k of x_k."""
        found = []
        for tensors, on in ((border.own, ("both", "own")), (border.slow, ("both", "slow"))):
            if self.auxiliary in on:
                with border.holding(tensors):
                    found.append(u())
        z = sum(found[1:], found[0]) if found else x
        z = z / len(found) if self.mix == "mean" and len(found) > 1 else z
        if border.A is None or border.B is None:
            return z
        return z + F.linear(F.linear(z, border.A.to(z.dtype)), border.B.to(z.dtype))

    def _pass_on(self, *given: Any, **named: Any) -> Any:
        return self._shaped(given[0] if given else named["hidden_states"])

    def _shaped(self, h: Tensor) -> Any:
        """A hidden state as the model's layers give it."""
        return h if self.tail is None else (h, *self.tail)

    def _survey(self, run: Run, batch: Any) -> None:
        """Find out in one pass without gradient which tensors go with which block, and that the layers are a chain."""
        model, every = self.adapter.model, self.adapter.every().values()
        inputs, outputs, early = [], [], set()

        def before(module: nn.Module, given: tuple, named: dict[str, Any]) -> None:
            inputs.append(given[0] if given else named["hidden_states"])

        handles = [b.register_forward_pre_hook(before, with_kwargs=True) for b in self.layers_of]
        handles += [b.register_forward_hook(lambda m, a, y: outputs.append(y)) for b in self.layers_of]
        for module in {d.site.module for d in every}:
            handles.append(module.register_forward_pre_hook(lambda m, a: None if inputs else early.add(m)))
        try:
            with torch.no_grad(), as_it_is(model):
                run(batch)
        finally:
            for h in handles:
                h.remove()
        tails = {() if isinstance(y, Tensor) else tuple(y[1:]) for y in outputs}
        chained = len(inputs) == len(self.layers_of) and all(x is hidden(y) for x, y in zip(inputs[1:], outputs))
        if not chained or len(tails) != 1 or any(v is not None for v in next(iter(tails))):
            raise UserError(
                f"man: the layers of {type(model).__name__} do not each take the output of the one before and nothing "
                "else of it, so they cannot be cut into local blocks"
            )
        self.tail = None if isinstance(outputs[0], Tensor) else next(iter(tails))
        spans = [self.layers_of[a:b] for a, b in pairwise(self.bounds)]
        of = {m: k for k, span in enumerate(spans) for b in span for m in b.modules()}
        self.owner = {
            id(p): of.get(d.site.module, 0 if d.site.module in early else self.blocks - 1)
            for d in every
            for p in d.parameters()
        }
        self.owner |= {id(p): k for k, b in enumerate(self.borders) for p in b.parameters().values()}

    def on_end(self) -> None:
        self.borders = []

    def state_dict(self) -> dict[str, Any]:
        return {f"{k}.{n}": t for k, b in enumerate(self.borders) for n, t in b.slow.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for k, border in enumerate(self.borders):
            for name, slow in border.slow.items():
                slow.copy_(state[f"{k}.{name}"])
