"""What tuning cost elsewhere: the loss on general text, and how far the predictions moved from the base's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from veneer.errors import UserError
from veneer.train.modes import evaluating

ROWS, LENGTH = 16, 128  # pieces of general text, tokens each
LETTERS = 8  # of text cut for each token wanted: more than a token has


def general_text(path: str | Path | None = None) -> str:
    """General English: a text file, or else the language reference that every Python carries (``pydoc_data``)."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the general text {path} cannot be read ({error}); give a UTF-8 text file") from error
    if not text.strip():
        raise UserError(f"the general text {path} is empty; give a file of ordinary text")
    return text


def pieces(text: str, tokenizer: Any, rows: int = ROWS, length: int = LENGTH) -> torch.Tensor:
    """``(rows, length)`` token ids: whole pieces spread evenly over the text, fewer rows where it is short."""
    size = max(1, min(LETTERS * length, len(text)))
    count = max(1, min(rows, len(text) // size))
    starts = [round(i * (len(text) - size) / max(1, count - 1)) for i in range(count)]
    cut = [tokenizer(text[s : s + size])["input_ids"][:length] for s in starts]
    whole = [ids for ids in cut if len(ids) == length]
    if not whole:
        raise UserError(f"the general text has {len(cut[0])} tokens; at least {length} are needed")
    return torch.tensor(whole)


@torch.no_grad()
def text_loss(model: Any, ids: torch.Tensor, batch_size: int = 4) -> float:
    """The loss on ``ids (rows, length)`` of a language model as it is, nats a token."""
    total, parts = 0.0, ids.to(next(model.parameters()).device).split(batch_size)
    with evaluating(model):
        for part in parts:
            logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
            total += float(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return total / (ids.shape[0] * (ids.shape[1] - 1))


def forgetting(adapter: Any, ids: torch.Tensor, batch_size: int = 4) -> dict[str, float]:
    """``general_loss`` and ``general_loss_base`` (nats a token), and ``drift``: KL(base ‖ adapted), nats a token.

    Each piece runs twice, with the adapter and without, and neither logits are kept.
    """
    model, totals, count = adapter.model, [0.0, 0.0, 0.0], 0
    device = next(model.parameters()).device
    with evaluating(model):
        for part in ids.to(device).split(batch_size):
            with adapter.disabled():
                base = F.log_softmax(model(input_ids=part, use_cache=False).logits[:, :-1].float(), -1)
            tuned = F.log_softmax(model(input_ids=part, use_cache=False).logits[:, :-1].float(), -1)
            wanted = part[:, 1:, None]
            totals[0] -= float(tuned.gather(-1, wanted).double().sum())
            totals[1] -= float(base.gather(-1, wanted).double().sum())
            totals[2] += float(F.kl_div(tuned, base, reduction="sum", log_target=True))
            count += wanted.numel()
    names = ("general_loss", "general_loss_base", "drift")
    return {name: total / count for name, total in zip(names, totals)}
