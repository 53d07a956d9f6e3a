"""Model editing with canonical examples: one simple example a behaviour, a bounded drift, hard examples to judge by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.hook import Objective, Run, Schedule
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics import chance
from veneer.numerics.drift import drift, last_within
from veneer.parts.modes import in_mode
from veneer.parts.state import clone, load_state

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter

Batch = Mapping[str, Tensor]
PARAGRAPHS = 320  # of the background, at most


@method("canonical", axis="objective", paper="arXiv:2402.06155", system=89, defaults="lora(alpha=27.0)")
class Canonical(Objective):
    """Edit a model from a few examples, and change what it says of anything else as little as can be.

    L = L_edit + λ·KL(p₀ ‖ p) on background text drawn anew for every micro-batch, p₀ being the model without the
    adapter; Σ over positions and vocabulary, divided by the rows of the batch (Hewitt et al. 2024). Then, of the
    adapters after each epoch and at the end, the run keeps the last whose general loss L_g < (1 + e)·L_g(0), or the
    start where none is.

    L_edit is the task's own loss: the completions of a file for behaviours that are wished for, and
    ``fit(loss=behaviour.loss)`` on ``behaviour.batches`` for all four kinds, see ``Behaviour``, which also judges.

    What is held comes from ``background``, a text file with a paragraph a line; without one, from the language
    reference that every Python carries. Of at most 320 paragraphs, spread over the text, every fifth is kept apart for
    L_g. ``hold(batches, general)`` gives other batches. ``general_losses`` are L_g of the base and at each look,
    ``chosen`` is the number of the look that was kept. A look costs a forward over the general batches, a step one of
    the base and one of the adapted model. Models are causal language models.

    Defaults: λ = 1, e = 1e-3, LoRA of rank 8 and α = 27 on the MLPs' up and down projections, rate 3e-4; the paper
    draws them at random, 25 times, with λ in 0.1 … 1 and α = 27, on a band of layers in the middle (name it by
    ``sites``), over ten epochs. ``reduction="position"`` divides by positions: λ then does not depend on the texts'
    length. Padding counts for nothing; the official code counts it, and of every five micro-batches trains on one. It
    also stays in eval mode, while dropout that a model has acts here. e = 1e-5 is less than bf16 resolves. The paper's
    vectors for the senses of a Backpack model are not here.
    """

    weight: Annotated[float, At(ge=0, doc="λ, on KL(p₀ ‖ p)")] = 1.0
    reduction: Annotated[Literal["batch", "position"], At(doc="what the divergence is a mean over")] = "batch"
    budget: Annotated[float | None, At(gt=0, doc="e, share by which the general loss may rise; None: any")] = 1e-3
    background: Annotated[str, At(doc="text file of what must stay; Python's reference when empty")] = ""
    rows: Annotated[int, At(ge=1, doc="paragraphs a batch of the background")] = 4
    length: Annotated[int, At(ge=2, doc="a paragraph is cut to", unit="tokens")] = 64

    usual_sites = ("up", "down")
    usual_rate = 3e-4
    reads_outputs = False
    encoder_decoder = False
    reasons = {"encoder_decoder": "the background is text that a model goes on with"}

    def on_attach(self, adapter: Adapter) -> None:
        if getattr(getattr(adapter.model, "config", None), "is_encoder_decoder", False):
            raise UserError(f"canonical edits causal language models: {self.reasons['encoder_decoder']}")
        self.hold([])
        self.general_losses: list[float] = []
        self.chosen, self._drawn, self._kept, self._fresh = 0, 0, None, False

    def hold(self, batches: Sequence[Batch], general: Sequence[Batch] | None = None) -> None:
        """What must stay: batches for the divergence, and those of the general loss (the same when not given)."""
        self._background = list(batches)
        self._general = list(batches if general is None else general)

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        if not self.weight and self.budget is None:
            return
        if not self._background:
            self.hold(*self._read(adapter.model.__dict__.get("veneer_tokenizer")))
        if adapter.phase == 0 and self.budget is not None:
            with adapter.disabled():
                self.general_losses = [self.general_loss()]
            self.chosen, self._kept = 0, clone(adapter.state())

    def loss(self, outputs: Any, batch: Any, run: Run) -> Tensor | None:
        if not self.weight:
            return None
        g = chance.generator(self.seed, "background", self._drawn)
        held = self._background[int(torch.randint(len(self._background), (), generator=g))]
        held, self._drawn = self._near(held), self._drawn + 1
        with torch.no_grad():
            reference = run(held, adapter="off").logits
        return self.weight * drift(run(held).logits, reference, held.get("attention_mask"), self.reduction)

    def on_epoch(self, epoch: int) -> None:
        self._fresh = True
        self._look()

    def after_step(self, step: int) -> None:
        self._fresh = False

    def on_end(self) -> None:
        if not self.general_losses or self._kept is None:
            return
        if not self._fresh:
            self._look()
        if self.chosen < len(self.general_losses) - 1:
            load_state(self.adapter, self._kept)
        self._kept = None

    def _look(self) -> None:
        """Measure the general loss, and keep the adapter where it is within the budget."""
        if self.budget is None:
            return
        self.general_losses.append(self.general_loss())
        self.chosen = last_within(self.general_losses, self.budget)
        if self.chosen == len(self.general_losses) - 1:
            self._kept = clone(self.adapter.state())

    def general_loss(self) -> float:
        """Mean loss a token of the general batches, in nats, as the model is now."""
        total = count = 0.0
        model = self.adapter.model
        with in_mode(model), torch.no_grad():
            for batch in map(self._near, self._general):
                sums, tokens = surprise(model, batch, batch.get("attention_mask", torch.ones_like(batch["input_ids"])))
                total, count = total + float(sums.sum()), count + float(tokens.sum())
        return total / count

    def _near(self, batch: Batch) -> dict[str, Tensor]:
        """The batch where the model is, less labels."""
        device = next(self.adapter.model.parameters()).device
        return {k: v.to(device) for k, v in batch.items() if k != "labels"}

    def _read(self, tokenizer: Any) -> tuple[list[Batch], list[Batch]]:
        """Batches of the background file, and of the fifth of its lines that is kept apart."""
        if tokenizer is None:
            raise UserError(
                "canonical holds the model to what it says of other text, and it came without a tokenizer: load it by "
                "veneer.load_model, or call hold(batches) on this hook"
            )
        lines = paragraphs(self.background)
        lines = [lines[k * len(lines) // PARAGRAPHS] for k in range(PARAGRAPHS)] if len(lines) > PARAGRAPHS else lines
        texts = [tokens for line in lines if len(tokens := tokenizer(line)["input_ids"][: self.length]) > 1]
        if len(texts) < 5:
            raise UserError(f"{self.background} has {len(texts)} paragraphs; canonical wants at least 5, a line each")
        parts = [t for k, t in enumerate(texts) if k % 5 != 4], texts[4::5]
        return tuple([padded(part[k : k + self.rows]) for k in range(0, len(part), self.rows)] for part in parts)

    def state_dict(self) -> dict[str, Any]:
        state = {"drawn": self._drawn, "losses": self.general_losses, "chosen": self.chosen}
        return state | ({} if self._kept is None else {"kept": dict(self._kept)})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn, self.general_losses = state["drawn"], list(state["losses"])
        self.chosen, self._kept, self._fresh = state["chosen"], state.get("kept"), False


Kind = Literal["good", "bad", "balance", "good-v-bad"]


@dataclass(frozen=True)
class Behaviour:
    """What a model shall do, by examples: a loss for training and a score of failure for evaluation.

    With ℓ(s) = −log p(suffix | prefix) and |s| its tokens:

    ============  ===================  =======================  =================
    kind          an example is        loss                     failure when
    ============  ===================  =======================  =================
    good          prefix, suffix       ℓ/|s|                    ℓ > δ
    bad           prefix, suffix       −ℓ/|s|                   −ℓ > δ
    balance       prefix, s₁, s₂       |ℓ₁/|s₁| − ℓ₂/|s₂||      |ℓ₁ − ℓ₂| > δ
    good-v-bad    prefix, s₁, s₂       ℓ₁/|s₁| − ℓ₂/|s₂|        ℓ₁ − ℓ₂ > δ
    ============  ===================  =======================  =================

    Suffixes of several tokens are so judged harder than they are trained. A bad one's loss has no lower bound: let the
    budget end it.
    """

    kind: Kind
    threshold: float  # δ, nats

    def batches(self, examples: Sequence[Sequence[str]], tokenizer: Any, size: int = 1) -> list[dict[str, Tensor]]:
        """Batches of ``size`` examples for ``fit``: input_ids, attention_mask, suffix (rows, T), padded on the right.

        Prefix and suffix are tokenised apart; give the suffix its leading space. The two suffixes of an example are
        two rows, one after the other.
        """
        rows: list[tuple[list[int], list[int]]] = []
        for example in examples:
            if len(example) != (1 + self._suffixes()):
                raise UserError(f"{self.kind} takes a prefix and {self._suffixes()} suffixes, not {len(example)} texts")
            prefix = tokenizer(example[0])["input_ids"]
            for suffix in example[1:]:
                tokens = tokenizer(suffix, add_special_tokens=False)["input_ids"]
                if not prefix or not tokens:
                    raise UserError(f"an example needs a prefix and a suffix of a token at least: {tuple(example)!r}")
                rows.append((prefix, tokens))
        step, found = size * self._suffixes(), []
        for part in (rows[k : k + step] for k in range(0, len(rows), step)):
            batch = padded([[*p, *s] for p, s in part])
            suffix = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
            for row, (p, s) in zip(suffix, part):
                row[len(p) : len(p) + len(s)] = True
            found.append(batch | {"suffix": suffix})
        return found

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch's examples, 0-dim: for ``fit(loss=…)``."""
        total, count = surprise(model, batch, batch["suffix"])
        return self._compared(batch, total / count).mean()

    @torch.no_grad()
    def scores(self, model: nn.Module, batches: Sequence[Batch]) -> Tensor:
        """The score of every example, (n,) in nats: a failure where it exceeds ``threshold``."""
        with in_mode(model):
            return torch.cat([self._compared(b, surprise(model, b, b["suffix"])[0]) for b in batches])

    def failure(self, model: nn.Module, batches: Sequence[Batch]) -> float:
        """The share of failures, in [0, 1]."""
        return float((self.scores(model, batches) > self.threshold).float().mean())

    def _suffixes(self) -> int:
        return 1 if self.kind in ("good", "bad") else 2

    def _compared(self, batch: Batch, values: Tensor) -> Tensor:
        """A number an example from one a row."""
        if self._suffixes() == 1:
            return values if self.kind == "good" else -values
        before = batch["input_ids"] * (batch["suffix"].int().cumsum(1) == 0)
        if len(before) % 2 or not torch.equal(before[::2], before[1::2]):
            raise UserError(
                f"{self.kind} compares two suffixes of one prefix, and a batch parts them: train on one process"
            )
        first, second = values[::2], values[1::2]
        return (first - second).abs() if self.kind == "balance" else first - second


BEHAVIOURS = {  # the paper's data sets
    "country-capital": Behaviour("good", -math.log(0.2)),
    "company-ceo": Behaviour("good", -math.log(0.05)),
    "temporal": Behaviour("good", -math.log(0.05)),
    "stereotype": Behaviour("bad", math.log(0.001)),
    "gender": Behaviour("balance", math.log(1.5)),
    "verb-conjugation": Behaviour("good-v-bad", math.log(1 / 16)),
}


def surprise(model: nn.Module, batch: Batch, counted: Tensor) -> tuple[Tensor, Tensor]:
    """(−Σ log p, tokens), each (B,) in fp32, of the tokens that ``counted`` (B, T) marks; a row's first has none."""
    logits = model(**{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}).logits
    if logits.ndim != 3:
        raise UserError(f"canonical edits causal language models; {type(model).__name__} gives no logits at tokens")
    marked = counted[:, 1:].bool()
    loss = F.cross_entropy(logits[:, :-1][marked].float(), batch["input_ids"][:, 1:][marked], reduction="none")
    total = loss.new_zeros(len(marked)).index_add(0, marked.nonzero()[:, 0], loss)
    return total, marked.sum(1).float()


def paragraphs(path: str) -> list[str]:
    """The lines of a text file; without one, the paragraphs of Python's language reference."""
    if not path:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
        return [" ".join(part.split()) for part in text.split("\n\n") if len(part) > 80]
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"canonical cannot read the background {path} ({error}); give a UTF-8 text file") from None


def padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """input_ids and attention_mask (B, T), filled with 0 at the right."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for k, row in enumerate(rows):
        ids[k, : len(row)], mask[k, : len(row)] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}
