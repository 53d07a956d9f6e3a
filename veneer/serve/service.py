"""The engine in a thread of its own, and what it says handed to an event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

from veneer.serve.engine import Engine
from veneer.serve.request import Event, Request

log = logging.getLogger("veneer.serve")


class Busy(Exception):
    """The queue is full; try again in ``after`` seconds."""

    def __init__(self, sentence: str, after: int) -> None:
        super().__init__(sentence)
        self.after = after


class Service:
    """Runs an engine.

    ``generate`` is an async iterator of a request's events; leaving it early gives the request up.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.draining = False
        self.failure: str | None = None
        self._wake = threading.Event()
        self._stop = False
        self._thread: threading.Thread | None = None
        self._out: list[Event] = []
        self._queues: dict[Request, asyncio.Queue[Event]] = {}
        self._open: set[Request] = set()
        self._rate = 0.0
        engine._notify = engine.bank.loader.notify = self._wake.set

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to serve; events are handed to ``loop``."""
        self._loop = loop
        self._thread = threading.Thread(target=self._run, name="veneer-engine", daemon=True)
        self._thread.start()

    async def stop(self, patience: float = 30.0) -> None:
        """Take no more requests, let those under way finish for up to ``patience`` seconds, and end."""
        self.draining = True
        until = time.monotonic() + patience
        while self.engine.busy and time.monotonic() < until:
            await asyncio.sleep(0.02)
        self._stop = True
        self._wake.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 10)
        self.engine.close()

    @property
    def open(self) -> int:
        """Requests that the engine has not finished; whether their answers were read does not matter."""
        return len(self._open)

    def check(self) -> None:
        """Raise Busy when no request can be taken now."""
        if self.draining:
            raise Busy("the server is stopping and takes no new requests", 5)
        if self.failure is not None:
            raise Busy(f"the engine has stopped: {self.failure}; restart the server", 60)
        if self.open >= self.engine.limits.queue + self.engine.limits.batch:
            self.engine.totals.refused += 1
            raise Busy(f"{self.open} requests are under way already; try again later", self.after())

    def after(self) -> int:
        """Seconds after which a queue place is likely free."""
        waiting = max(1, self.open - self.engine.limits.batch)
        return max(1, min(60, round(waiting / self._rate))) if self._rate > 0 else 2

    async def generate(self, request: Request) -> AsyncIterator[Event]:
        """The request's events up to its end. Raises UserError or Busy when it is not taken."""
        self.check()
        self.engine.check(request)
        queue: asyncio.Queue[Event] = asyncio.Queue()
        self._queues[request] = queue
        request.sink = self._out.append
        self._open.add(request)
        try:
            self.engine.submit(request)
            while True:
                event = await queue.get()
                yield event
                if event.reason is not None:
                    return
        finally:
            self._open.discard(request)
            del self._queues[request]
            if request.reason is None:
                self.engine.cancel(request)

    def _run(self) -> None:
        finished, since = 0, time.monotonic()
        while not self._stop:
            self._wake.clear()
            try:
                moved = self.engine.step()
            except Exception as error:  # a defect: say so to everybody who waits, and in /health
                log.exception("the engine failed")
                self.failure = f"{type(error).__name__}: {error}"
                self._fail()
                return
            finished += self._flush()
            now = time.monotonic()
            if now - since > 1:
                self._rate = 0.7 * finished / (now - since) + 0.3 * self._rate if finished else self._rate
                finished, since = 0, now
            if not moved:
                self._wake.wait(0.05 if self.engine.busy else 1.0)

    def _flush(self) -> int:
        if not self._out:
            return 0
        events = self._out[:]
        self._out.clear()
        self._loop.call_soon_threadsafe(self._hand, events)
        return sum(e.reason is not None for e in events)

    def _hand(self, events: list[Event]) -> None:
        for event in events:
            if event.reason is not None:
                self._open.discard(event.request)
            queue = self._queues.get(event.request)
            if queue is not None:
                queue.put_nowait(event)

    def _fail(self) -> None:
        for request in [*self.engine.waiting, *self.engine.running]:
            request.reason = "error"
            self._out.append(
                Event(request, reason="error", detail="the engine has failed; the server must be restarted")
            )
        self._flush()


def facts(service: Service) -> dict[str, Any]:
    """What /health says."""
    engine = service.engine
    return {
        "status": "failed" if service.failure else "draining" if service.draining else "ok",
        "running": len(engine.running),
        "waiting": len(engine.waiting),
        "adapters": len(engine.bank.entries),
        "resident": engine.bank.resident,
        "pages": {"total": engine.pool.pages, "free": engine.pool.free, "kept": engine.prefixes.idle},
    }
