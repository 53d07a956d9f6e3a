"""Refuses bodies that are too long, before they are read."""

from __future__ import annotations

import json
from typing import Any


class Limit:
    """ASGI middleware: a body of more than ``most`` bytes is answered 413, whether its length was told or not."""

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass a call on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        told = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
        if not told.isdigit() or int(told) > self.most:
            await self._refuse(send)
            return
        got, begun = 0, False

        async def counted() -> dict[str, Any]:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > self.most and not begun:
                raise _TooLong
            return message

        async def noted(message: dict[str, Any]) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except _TooLong:
            await self._refuse(send)

    async def _refuse(self, send: Any) -> None:
        sentence = f"the body is longer than the {self.most} bytes that are taken; shorten the prompt"
        body = json.dumps({"error": {"message": sentence, "type": "invalid_request_error", "code": 413}}).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class _TooLong(Exception):
    pass
