"""Prompt tuning: trained vectors ahead of the input's embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from veneer.core.adapted import Base
from veneer.core.delta import Delta, Slot
from veneer.core.registry import PeftMap, method
from veneer.core.site import Site, module_site
from veneer.errors import UserError
from veneer.fields import At
from veneer.models import architecture
from veneer.parts import trunk


@method("prompt", axis="delta", paper="arXiv:2104.08691", system=0, gives=("frozen-base",))
class Prompt(Delta):
    """n soft tokens before every input; the weights stay as they are, so one batch can mix tasks.

    h = trunk([P; E]) with E the embeddings of the input; the outputs at P are dropped (Lester et al. 2021, §2).

    ======  ========  =========  ===================================================
    tensor  shape     trained    start
    ======  ========  =========  ===================================================
    P       (n, d)    yes        rows of the embedding table, drawn without repeats
    ======  ========  =========  ===================================================

    Other starts: the embeddings of ``tokens``, repeated or cut to n; ``start="uniform"``, the paper's U(−0.5, 0.5);
    ``"normal"``, PEFT's N(0, 1), which can cost several nats at first. Defaults: n = 20 (paper 20 to 100, rate 0.3 with
    Adafactor). One place, the trunk, whatever is selected.

    Mask, token types, positions and the key-value cache are lengthened; given positions move up by n, where PEFT drops
    them. Labels stay as they are, since the trunk's output has the input's length. With left padding P stands before
    the padding, as in PEFT. A pooled output is that of the input's first token; ``pooled="prompt"`` is PEFT's, of the
    first soft token. P-tuning's trained encoder is left out; what it leaves behind is a prompt.
    """

    length: Annotated[int, At(ge=1, doc="n, number of soft tokens")] = 20
    start: Annotated[Literal["vocabulary", "uniform", "normal"], At(doc="where P starts")] = "vocabulary"
    tokens: Annotated[tuple[int, ...], At(doc="ids of a text whose embeddings P starts from")] = ()
    pooled: Annotated[Literal["sequence", "prompt"], At(doc="whose first token a pooled output is of")] = "sequence"

    layers = ("module",)
    starts_at_base = False
    folds = False
    encoder_decoder = False
    reasons = {
        "starts_at_base": "soft tokens take part in attention from the first step",
        "folds": "soft tokens lengthen the input, which no weight does",
        "encoder_decoder": "an encoder's output would keep the soft tokens, which the decoder attends to",
    }
    peft = PeftMap("PROMPT_TUNING", fields={"length": "num_virtual_tokens"}, keys={"P": "prompt_embeddings"})

    @classmethod
    def places(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any]) -> list[Site]:
        """The trunk, whatever is selected."""
        inner, table = architecture.trunk(model), architecture.embedding(model)
        path = next(n for n, m in model.named_modules() if m is inner)
        config = architecture.text_config(model)
        tokens = isinstance(table, nn.Embedding)
        if not path or not tokens or config is None or getattr(config, "is_encoder_decoder", False):
            raise UserError(
                "prompt runs a transformers trunk that embeds tokens and stands under one head; "
                f"{type(model).__name__} is another kind of model (encoder–decoders are not supported)"
            )
        return [module_site(model, path, {"embed": table})]

    def slots(self) -> Iterable[Slot]:
        yield Slot("P", "core", (self.length, self._table().shape[1]), self._begin)

    def forward(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Any:
        module = self.site.module
        names = list(inspect.signature(type(module)._veneer_base.forward).parameters)[1:]
        call = kwargs if x is None else dict(zip(names, (x, *args))) | kwargs
        ids, given = call.pop("input_ids", None), call.pop("inputs_embeds", None)
        E = base.parts["embed"](ids) if given is None else given
        past = call.get("past_key_values")
        begun = past is not None and int(past.get_seq_length()) > 0
        call |= self._lengthened(call, begun)
        if begun:  # the cache holds the soft tokens already
            return base(None, **call, inputs_embeds=E)
        P = self.P.to(E.dtype).expand(len(E), -1, -1)
        out = base(None, **call, inputs_embeds=torch.cat([P, E], 1))
        return self._shortened(out)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise UserError(f"prompt cannot fold: {self.reasons['folds']}")

    def parameter_count(self) -> int:
        """n·d."""
        return self.length * self._table().shape[1]

    def _table(self) -> Tensor:
        """The embedding table (vocabulary, d)."""
        return self.site.parts["embed"].weight().T

    def _begin(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        table, n = self._table(), self.length
        if self.start == "uniform" and not self.tokens:
            return torch.empty(shape).uniform_(-0.5, 0.5, generator=generator)
        if self.start == "normal" and not self.tokens:
            return torch.empty(shape).normal_(generator=generator)
        beyond = next((t for t in self.tokens if not 0 <= t < len(table)), None)
        if beyond is not None:
            raise UserError(f"prompt: token {beyond} is not in the vocabulary of {len(table)}")
        rows = torch.tensor(self.tokens) if self.tokens else torch.randperm(len(table), generator=generator)
        return table[rows.repeat(-(-n // len(rows)))[:n].to(table.device)]

    def _lengthened(self, call: dict[str, Any], begun: bool) -> dict[str, Any]:
        """What of the call says how long the input is, for an input with the soft tokens."""
        n, changed = self.length, {}
        mask, types = call.get("attention_mask"), call.get("token_type_ids")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                raise UserError("prompt needs the attention mask as (batch, tokens); a mask of another form was given")
            changed["attention_mask"] = torch.cat([mask.new_ones(len(mask), n), mask], 1)
        if types is not None and not begun:
            changed["token_type_ids"] = torch.cat([types.new_zeros(len(types), n), types], 1)
        for name in ("position_ids", "cache_position"):
            at = call.get(name)
            if at is not None:
                first = torch.arange(n, dtype=at.dtype, device=at.device).expand(*at.shape[:-1], n)
                changed[name] = at + n if begun else torch.cat([first, at + n], -1)
        return changed

    def _shortened(self, out: Any) -> Any:
        """The trunk's output without the soft tokens."""
        n, pooled = self.length, getattr(out, "pooler_output", None)
        states = getattr(out, "hidden_states", None)
        out = trunk.replaced(self.site.module, out, trunk.hidden(out)[:, n:])
        if states is not None:
            out["hidden_states"] = tuple(h[:, n:] for h in states)
        if pooled is not None and self.pooled == "prompt":
            out["pooler_output"] = pooled
        return out
