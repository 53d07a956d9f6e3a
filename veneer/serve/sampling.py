"""From logits to tokens: greedy, temperature, top-k, top-p, seeds, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

HEAD = 256  # how many of the likeliest tokens are looked at first for top-p


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen; temperature 0 takes the likeliest.

    ``logprobs`` is how many alternatives to report with each token, None for no log-probabilities at all. With a seed
    the n-th token's draw depends on the seed and n alone.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    logprobs: int | None = None


class Choice(NamedTuple):
    """A token, its log-probability and the likeliest alternatives with theirs."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@torch.inference_mode()
def choose(logits: Tensor, requests: Sequence[Any]) -> list[Choice]:
    """The next token of each request; ``logits`` (requests, vocabulary).

    A request has ``sampling`` and ``generated``; its generator is made on first use and kept on it.
    """
    tokens = likeliest(logits)
    out = [Choice(t) for t in tokens]
    for row, request in enumerate(requests):
        s = request.sampling
        if s.temperature > 0:
            out[row] = Choice(draw(logits[row].float(), s, generator(request)))
        if s.logprobs is not None:
            out[row] = scored(logits[row].float(), out[row].token, s.logprobs)
    return out


def likeliest(logits: Tensor) -> list[int]:
    """The index of the largest logit of each row; of equal ones the first."""
    if logits.device.type != "cpu":
        return logits.argmax(-1).tolist()
    return logits.float().numpy().argmax(-1).tolist()  # torch's own takes six times as long, thirty in bf16


def generator(request: Any) -> torch.Generator:
    """The request's own source of chance."""
    found = getattr(request, "generator", None)
    if found is None:
        found = torch.Generator()
        if request.sampling.seed is None:
            found.seed()
        else:
            found.manual_seed(request.sampling.seed)
        request.generator = found
    return found


def draw(logits: Tensor, s: Sampling, source: torch.Generator) -> int:
    """One token from logits (vocabulary,): temperature, the ``top_k`` likeliest, the least set of ``top_p``."""
    at = float(torch.rand((), generator=source, dtype=torch.float64))
    logits = logits.cpu() / max(s.temperature, 1e-4)
    if not s.top_k and s.top_p >= 1:
        return _at(logits.softmax(-1), at)
    size = logits.shape[0]
    count = min(size, s.top_k) if s.top_k else min(size, HEAD)
    values, index = logits.topk(count)
    p = (values - torch.logsumexp(values if s.top_k else logits, 0)).exp()
    if s.top_p < 1 and not s.top_k and count < size and float(p.sum()) < s.top_p:
        values, index = logits.sort(descending=True)
        p = values.softmax(-1)
    if s.top_p < 1:
        before = p.cumsum(0) - p
        p = p[: max(1, int((before < s.top_p).sum()))]
    return int(index[_at(p, at)])


def scored(logits: Tensor, token: int, count: int) -> Choice:
    """The token with its log-probability and the ``count`` likeliest tokens."""
    logs = logits.log_softmax(-1)
    top = logs.topk(min(count, logs.shape[0])) if count else None
    alternatives = () if top is None else tuple(zip(top.indices.tolist(), top.values.tolist()))
    return Choice(token, float(logs[token]), alternatives)


def _at(p: Tensor, at: float) -> int:
    """The index at which the share ``at`` of the total is reached."""
    total = p.double().cumsum(0)
    found = int(torch.searchsorted(total, at * float(total[-1]), right=True))
    return min(found, p.shape[0] - 1)
