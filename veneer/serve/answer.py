"""From a request's events to the bodies of the OpenAI interface: whole answers and streams."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from veneer.serve.request import Event, Request
from veneer.serve.service import Service
from veneer.serve.text import Writer


@dataclass
class Piece:
    """Some text of an answer, with its tokens' log-probabilities as the interface shows them."""

    text: str
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None


class Refusal(Exception):
    """The engine ended a request before its first token: ``reason`` and one sentence."""

    def __init__(self, event: Event) -> None:
        super().__init__(event.detail)
        self.reason = event.reason


class Answer:
    """One request's answer while it comes.

    Args:
        chat: whether it is of the chat interface.
        model: the name that was asked for.
    """

    def __init__(
        self, service: Service, request: Request, tokenizer: Any, model: str, stops: list[str], chat: bool
    ) -> None:
        self.service, self.request, self.tokenizer, self.model, self.chat = service, request, tokenizer, model, chat
        self.writer = Writer(tokenizer, stops)
        self.key = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.count = 0

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer piece by piece; the last one has ``finish``. Raises Refusal when it ends before it began."""
        held: list[dict[str, Any]] = []
        events = self.service.generate(self.request)
        try:
            async for event in events:
                if event.token is None:
                    if event.reason in ("aborted", "error"):
                        raise Refusal(event)
                    yield Piece(self.writer.end(), held, "length" if event.reason == "length" else "stop")
                    return
                self.count += 1
                if event.token in self.request.stops:
                    continue
                if event.logprob is not None:
                    held.append(self._logprob(event))
                text = self.writer.push(event.token)
                if self.writer.stopped:
                    self.request.enough = True
                    yield Piece(text, held, "stop")
                    return
                if text:
                    yield Piece(text, held)
                    held = []
        finally:
            await events.aclose()

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        text, logprobs, finish = "", [], None
        async for piece in self.pieces():
            text += piece.text
            logprobs += piece.logprobs
            finish = piece.finish or finish
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": self._shown(logprobs), "finish_reason": finish}
        return {**self._head(""), "choices": [choice], "usage": self.usage()}

    async def stream(self, first: Piece, rest: AsyncIterator[Piece], usage: bool) -> AsyncIterator[str]:
        """Server-sent events; ``first`` has come already, so that an early end could still be an error's answer."""
        if self.chat:
            yield self._line({"delta": {"role": "assistant", "content": ""}, "logprobs": None}, None)
        try:
            piece: Piece | None = first
            while piece is not None:
                content = {"delta": {"content": piece.text}} if self.chat else {"text": piece.text}
                if piece.text or piece.logprobs:
                    yield self._line({**content, "logprobs": self._shown(piece.logprobs)}, None)
                if piece.finish:
                    empty = {"delta": {}} if self.chat else {"text": ""}
                    yield self._line({**empty, "logprobs": None}, piece.finish)
                    break
                piece = await anext(rest, None)
            if usage:
                yield f"data: {json.dumps({**self._head('.chunk'), 'choices': [], 'usage': self.usage()})}\n\n"
        except Refusal as refusal:
            yield f"data: {json.dumps({'error': {'message': str(refusal), 'type': 'server_error', 'code': 500}})}\n\n"
        finally:
            await rest.aclose()
        yield "data: [DONE]\n\n"

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompt and of the answer."""
        prompt = len(self.request.prompt)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.count,
            "total_tokens": prompt + self.count,
            "prompt_tokens_details": {"cached_tokens": self.request.reused},
        }

    def _head(self, kind: str) -> dict[str, Any]:
        what = f"chat.completion{kind}" if self.chat else "text_completion"
        return {"id": self.key, "object": what, "created": self.created, "model": self.model}

    def _line(self, content: dict[str, Any], finish: str | None) -> str:
        choice = {"index": 0, **content, "finish_reason": finish}
        return f"data: {json.dumps({**self._head('.chunk'), 'choices': [choice]}, ensure_ascii=False)}\n\n"

    def _logprob(self, event: Event) -> dict[str, Any]:
        def named(token: int, logprob: float) -> dict[str, Any]:
            text = self.tokenizer.decode([token])
            return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

        top = [named(t, p) for t, p in event.top]
        return {**named(event.token, event.logprob), "top_logprobs": top}

    def _shown(self, found: list[dict[str, Any]]) -> dict[str, Any] | None:
        if self.request.sampling.logprobs is None:
            return None
        if self.chat:
            return {"content": found, "refusal": None}
        return {
            "tokens": [f["token"] for f in found],
            "token_logprobs": [f["logprob"] for f in found],
            "top_logprobs": [{t["token"]: t["logprob"] for t in f["top_logprobs"]} for f in found],
        }
