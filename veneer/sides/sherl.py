"""SHERL: early states are put together beside the trunk and handed back to its last blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.delta import Delta, Slot
from veneer.core.registry import method
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.fields import At
from veneer.models import architecture
from veneer.numerics import chance
from veneer.parts import trunk

if TYPE_CHECKING:
    from veneer.core.adapted import Base
    from veneer.core.recipe import Recipe

EPS = 1e-6  # in the norms of features and of scores


def aggregate(f: Tensor, w: Tensor, beta: Tensor) -> Tensor:
    """z = Σᵢ cᵢfᵢ + g of f (n, …, e), the last of which is the guide g; w (e,), β ().

    cᵢ ∝ relu(wᵀ(fᵢ ⊙ g) + β)/Rᵢ, which sum to 1, with Rᵢ = Σⱼ relu(cos(fᵢ, fⱼ)) over the shallow ones, i among them.
    """
    shallow, g = f[:-1], f[-1]
    unit = F.normalize(shallow, dim=-1, eps=EPS)
    redundancy = torch.einsum("i...e,j...e->ij...", unit, unit).relu().sum(1).clamp_min(1.0)
    c = ((shallow * g) @ w + beta).relu() / redundancy
    c = c / (c.sum(0) + EPS)
    return (c[..., None] * shallow).sum(0) + g


@method("sherl", axis="side", paper="arXiv:2407.07523", system=147, gives=("frozen-base",))
class SHERL(Delta):
    """Reduce all early hidden states, weigh them against redundancy, and re-enter the frozen last blocks with the sum.

    fᵢ = φᵢ(hᵢ) without gradient in hᵢ, for the states h₀ … h_{n−1} up to the input of the last ``late`` blocks;
    z by ``aggregate``, each token on its own; h′ = Out(z) + gate·h_{n−1} goes through the late blocks, whose weights
    are frozen, and the model's head (Diao et al. 2024). Backward reaches the late blocks' activations and no others.

    ==========================  ================  =====================================================
    tensor                      shape             start
    ==========================  ================  =====================================================
    reduce, reduce_bias         (n, d/r, d)       U(±1/√d)
    mix, mix_bias (gated)       (n, 2, d/r, d/r)  U(±1/√(d/r))
    reduce_scale, reduce_shift  (n, d/r) (norm)   1 and 0
    score, score_bias           (d/r,)            U(±1/√(d/r)) and β = 0.1
    out, out_bias               (d, d/r)          U(±1/√(d/r)); 0 with gated reducers and ``identity``
    out_scale, out_shift        (d,) (norm)       1, or 0 with ``identity``; 0
    gamma                       ()                0
    ==========================  ================  =====================================================

    ``reducer="norm"``, of BERT: φ = LayerNorm(Ax + a), Out = dropout(LayerNorm(C·relu(z) + c)). ``"gated"``, of T5 and
    LXMERT: u = relu(Ax + a), φ = (M₁u + m₁ + u) ⊙ σ(M₂u + m₂), Out = C·relu(z) + c.

    Defaults: r = 2, one late block and T = 0.1 as for retrieval (r = 4 for GLUE). Otherwise than there: the paper's
    gate is tanh(γ/T), 0 at the start (``start="paper"``), so that the late blocks begin on a random projection; here it
    is 1 + tanh(γ/T) with an Out of 0, which starts at the base. β starts above 0 against dead scores, and dropout is 0
    (there 0.1 in BERT). The early blocks run under no_grad; neither they nor the first late one are checkpointed. A
    key-value cache is the model's own. The forms for ResNet, for CLIP's attention over tokens and for encoder–decoders
    are not here.
    """

    axis = "side"
    layers = ("module",)
    folds = False
    encoder_decoder = False
    reasons = {
        "folds": "a network beside the trunk is no change of its weights",
        "encoder_decoder": "two trunks would have to re-enter one after the other",
    }

    reduction: Annotated[int, At(ge=1, doc="r, by which the width is divided")] = 2
    late: Annotated[int, At(ge=1, doc="blocks at the end that are run on h′")] = 1
    temperature: Annotated[float, At(gt=0, doc="T of the gate")] = 0.1
    reducer: Annotated[Literal["norm", "gated"], At(doc="the form of φ and Out")] = "norm"
    start: Annotated[Literal["identity", "paper"], At(doc="at the base, or with a closed gate")] = "identity"
    dropout: Annotated[float, At(ge=0, lt=1, doc="on Out, norm form, in training only")] = 0.0

    @classmethod
    def takes(cls, site: Site) -> bool:
        """The trunk."""
        return site.kind == "module"

    @classmethod
    def places(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any]) -> list[Site]:
        """The trunk, whatever is selected."""
        site = trunk.place(model, "sherl")
        late, count = int(fields.get("late", cls.late)), len(architecture.blocks(site.module))
        if late >= count:
            raise UserError(
                f"sherl: late={late} leaves none of the {count} blocks to gather from; give {count - 1} at most"
            )
        return [site]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(n, d, d/r)."""
        module = self.site.module
        d = architecture.hidden_size(module)
        return len(architecture.blocks(module)) - self.late + 1, d, d // self.reduction

    def slots(self) -> Iterable[Slot]:
        n, d, e = self.sizes
        yield Slot("reduce", "factor_a", (n, e, d), chance.kaiming_uniform)
        yield Slot("reduce_bias", "bias", (n, e), _bound(d))
        yield Slot("score", "router", (e,), _bound(e))
        yield Slot("score_bias", "bias", (), lambda shape, g: torch.full(shape, 0.1))
        closed = self.start == "identity"
        plain = self.reducer == "gated" and closed
        yield Slot("out", "factor_b", (d, e), chance.zeros if plain else chance.kaiming_uniform)
        yield Slot("out_bias", "bias", (d,), chance.zeros if plain else _bound(e))
        yield Slot("gamma", "gate", (), chance.zeros)
        if self.reducer == "gated":
            yield Slot("mix", "core", (n, 2, e, e), chance.kaiming_uniform)
            yield Slot("mix_bias", "bias", (n, 2, e), _bound(e))
        else:
            yield Slot("reduce_scale", "magnitude", (n, e), chance.ones)
            yield Slot("reduce_shift", "bias", (n, e), chance.zeros)
            yield Slot("out_scale", "magnitude", (d,), chance.zeros if closed else chance.ones)
            yield Slot("out_shift", "bias", (d,), chance.zeros)

    @classmethod
    def check_recipe(cls, recipe: Recipe) -> None:
        """Refuse a form in the trunk: most of it would get no gradient."""
        form = recipe.part("delta")
        if form is not None:
            raise UserError(
                f"sherl runs the early blocks without gradient, so {form.method.name} inside them would not learn: "
                "attach it before as an adapter of its own, or leave it out"
            )

    def members(self) -> Iterable[Delta]:
        """None: the side is no delta of the recipe's form."""
        return ()

    # -- running

    def forward(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Any:
        every = [b for _, b in architecture.blocks(self.site.module)]
        early, door = every[: -self.late], every[-self.late]
        states: list[Tensor] = []

        def quietly(block: nn.Module) -> Callable[..., Any]:
            own = block.forward

            def run(*given: Any, **named: Any) -> Any:
                if not states:
                    states.append((given[0] if given else named["hidden_states"]).detach())
                with torch.no_grad():
                    output = own(*given, **named)
                states.append(trunk.hidden(output).detach())
                return output

            return run

        def enter(module: nn.Module, given: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            h = self.entry(states)
            return ((h, *given[1:]), named) if given else (given, named | {"hidden_states": h})

        with trunk.unchecked([*early, door]), trunk.standing_in({b: quietly(b) for b in early}):
            handle = door.register_forward_pre_hook(enter, with_kwargs=True)
            try:
                return base(x, *args, **kwargs)
            finally:
                handle.remove()

    def entry(self, states: list[Tensor]) -> Tensor:
        """h′ (batch, tokens, d) of the n states."""
        h = states[-1]
        score, beta, out, out_bias = self.cast(h, self.score, self.score_bias, self.out, self.out_bias)
        z = aggregate(torch.stack([self.reduced(i, s) for i, s in enumerate(states)]), score, beta)
        y = F.linear(z.relu(), out, out_bias)
        if self.reducer == "norm":
            y = self.drop(F.layer_norm(y, y.shape[-1:], *self.cast(h, self.out_scale, self.out_shift)))
        (gate,) = self.cast(h, (self.gamma / self.temperature).tanh() + float(self.start == "identity"))
        return y + gate * h

    def reduced(self, i: int, h: Tensor) -> Tensor:
        """φᵢ(h) (…, e)."""
        u = F.linear(h, *self.cast(h, self.reduce[i], self.reduce_bias[i]))
        if self.reducer == "norm":
            return F.layer_norm(u, u.shape[-1:], *self.cast(h, self.reduce_scale[i], self.reduce_shift[i]))
        u, mix, bias = u.relu(), *self.cast(h, self.mix[i], self.mix_bias[i])
        return (F.linear(u, mix[0], bias[0]) + u) * F.linear(u, mix[1], bias[1]).sigmoid()

    def parameter_count(self) -> int:
        """n·P(φ) + e + 1 + (e + 1)·d + 1, and 2d for Out's norm; P = (d + 1)e + 2e with a norm, + 2(e + 1)e gated."""
        n, d, e = self.sizes
        gated = self.reducer == "gated"
        return n * ((d + 1) * e + (2 * (e + 1) * e if gated else 2 * e)) + e + 2 + (e + 1) * d + (0 if gated else 2 * d)


def _bound(fan_in: int) -> Callable[[tuple[int, ...], torch.Generator], Tensor]:
    """The start U(±1/√fan_in)."""
    return lambda shape, g: torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=g)
