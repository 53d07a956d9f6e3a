"""Streams to clients that read slowly, or not at all."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from fastapi.responses import StreamingResponse

log = logging.getLogger("veneer.serve")


class Stream(StreamingResponse):
    """Server-sent events; a client that takes nothing for ``patience`` seconds is given up.

    What waits for a client is its own answer, at most ``max_tokens`` events, and what the socket holds; the engine
    waits for nobody.
    """

    def __init__(self, events: Any, patience: float) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.patience = patience

    async def stream_response(self, send: Any) -> None:
        """Send the events, each within the time allowed."""

        async def soon(message: dict[str, Any]) -> None:
            await asyncio.wait_for(send(message), self.patience)

        try:
            await super().stream_response(soon)
        except TimeoutError:
            log.warning(json.dumps({"event": "slow reader", "seconds": self.patience}))
        finally:
            await self.body_iterator.aclose()
