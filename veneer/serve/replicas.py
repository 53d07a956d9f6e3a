"""Several servers behind one address, under Ray Serve: a door that routes by adapter, and replicas with a model each.

Every replica is a deployment of its own, so that the door can choose; Ray puts them on the machines of its cluster and
starts a new one for one that died. The folder of adapters must be the same on all of them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator
from typing import Any

from veneer.errors import UserError
from veneer.serve.routing import adapter_of, choose
from veneer.serve.start import Start

log = logging.getLogger("veneer.serve")
NAME = "veneer"


class Replica:
    """One engine with its interface, called with ASGI's scope and the whole body."""

    def __init__(self, start: Start, settings: Any) -> None:
        from veneer.serve.app import build

        engine, tokenizer = start.engine()
        self.app = build(engine, tokenizer, settings)
        self._life: Any = None
        self._begin = asyncio.Lock()

    async def call(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[tuple[Any, ...]]:
        """(status, headers), then pieces of the answer's body as (bytes,)."""
        async with self._begin:
            if self._life is None:
                self._life = self.app.router.lifespan_context(self.app)
                await self._life.__aenter__()
        said: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        gone, told = asyncio.Event(), False

        async def receive() -> dict[str, Any]:
            nonlocal told
            if not told:
                told = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        task = asyncio.create_task(self.app({**scope, "type": "http"}, receive, said.put))
        task.add_done_callback(lambda _: said.put_nowait(None))
        try:
            while (message := await said.get()) is not None:
                if message["type"] == "http.response.start":
                    yield message["status"], message["headers"]
                elif message.get("body"):
                    yield (message["body"],)
        finally:
            gone.set()
            if not task.done():
                await asyncio.wait((task,), timeout=5)
            task.cancel()

    async def state(self) -> dict[str, Any]:
        """What /health says of it."""
        from veneer.serve.service import facts

        return facts(self.app.state.service)

    async def __del__(self) -> None:
        if self._life is not None:
            life, self._life = self._life, None
            await life.__aexit__(None, None, None)


class Door:
    """Takes every request and passes it to a replica; what changes the adapters goes to all."""

    def __init__(self, body: int, *replicas: Any) -> None:
        self.body, self.replicas = body, replicas
        self.loads = [0] * len(replicas)

    async def __call__(self, call: Any) -> Any:
        """Answer one HTTP request."""
        from starlette.responses import JSONResponse

        body = b""
        async for piece in call.stream():
            body += piece
            if len(body) > self.body:
                sentence = f"the body is longer than the {self.body} bytes that are taken; shorten the prompt"
                error = {"message": sentence, "type": "invalid_request_error", "code": 413}
                return JSONResponse({"error": error}, 413)
        keep = ("http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server")
        scope = {name: call.scope[name] for name in keep if name in call.scope} | {"root_path": "", "asgi": {}}
        if call.url.path == "/health":
            return await self._health()
        everywhere = call.method in ("POST", "DELETE") and call.url.path.startswith("/v1/adapters")
        if everywhere:
            await asyncio.gather(*(self._whole(n, scope, body) for n in range(1, len(self.replicas))))
        return await self._pass(0 if everywhere else choose(_asked(body), self.loads), scope, body)

    async def _pass(self, n: int, scope: dict[str, Any], body: bytes) -> Any:
        from starlette.responses import StreamingResponse

        self.loads[n] += 1
        pieces = self.replicas[n].call.options(stream=True).remote(scope, body)
        try:
            status, headers = await anext(aiter(pieces))
        except BaseException:
            self.loads[n] -= 1
            raise
        answer = StreamingResponse(self._rest(n, pieces), status)
        answer.raw_headers = [*headers, (b"x-veneer-replica", str(n).encode())]
        return answer

    async def _rest(self, n: int, pieces: Any) -> AsyncIterator[bytes]:
        done = False
        try:
            async for piece in pieces:
                yield piece[0]
            done = True
        finally:
            self.loads[n] -= 1
            if not done:
                pieces.cancel()

    async def _whole(self, n: int, scope: dict[str, Any], body: bytes) -> None:
        async for _ in self.replicas[n].call.options(stream=True).remote(scope, body):
            continue

    async def _health(self) -> Any:
        from starlette.responses import JSONResponse

        found = await asyncio.gather(*(r.state.remote() for r in self.replicas), return_exceptions=True)
        states = [{"status": "failed"} if isinstance(s, BaseException) else s for s in found]
        status = next((s["status"] for s in states if s["status"] != "ok"), "ok")
        return JSONResponse({"status": status, "replicas": states}, 200 if status == "ok" else 503)


def _asked(body: bytes) -> str | None:
    try:
        found = json.loads(body)
    except ValueError:
        return None
    return adapter_of(found.get("model")) if isinstance(found, dict) else None


def deploy(start: Start, settings: Any, count: int, host: str, port: int) -> None:
    """Start door and replicas on Ray's cluster, one that runs already (RAY_ADDRESS) or a local one; returns when ready.

    Raises UserError, with the command that helps, when Ray is missing.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray import serve
    except ImportError:
        raise UserError('--replicas needs Ray Serve; get it with: pip install "veneer[serve,ray]"') from None
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=True, configure_logging=False)
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    cores = (os.cpu_count() or 1) / count
    most = 2 * (start.batch + start.queue)
    options = {"max_ongoing_requests": most, "graceful_shutdown_timeout_s": settings.drain + 5}
    handles = [
        serve.deployment(Replica, name=f"replica{n}", ray_actor_options={"num_cpus": min(1.0, cores / 2)}, **options)
        .bind(start, settings)
        for n in range(count)
    ]  # fmt: skip
    door = serve.deployment(
        Door, name="door", max_ongoing_requests=2 * most * count, ray_actor_options={"num_cpus": 0}
    ).bind(settings.body, *handles)
    serve.run(door, name=NAME, route_prefix="/")


def run(start: Start, settings: Any, count: int, host: str, port: int) -> None:
    """Serve until a signal; then the replicas finish what is under way."""
    deploy(start, settings, count, host, port)
    import ray
    from ray import serve

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    serve.shutdown()
    ray.shutdown()
