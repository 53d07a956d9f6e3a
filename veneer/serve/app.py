"""The HTTP interface: OpenAI's for models, chat and completions, and Veneer's own for adapters, health and metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI
from fastapi import Request as Call
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from veneer.errors import UserError
from veneer.serve.answer import Answer, Piece, Refusal
from veneer.serve.engine import Engine
from veneer.serve.limit import Limit
from veneer.serve.metrics import Metrics
from veneer.serve.names import blend, checked, inside
from veneer.serve.page import PAGE
from veneer.serve.prompt import prompt_of, stops_of
from veneer.serve.request import Request
from veneer.serve.sampling import Sampling
from veneer.serve.schema import Addition, Chat, Completion, Failure
from veneer.serve.service import Busy, Service, facts
from veneer.serve.stream import Stream
from veneer.serve.watch import Watch

log = logging.getLogger("veneer.serve")
LOCAL = ("127.0.0.1", "::1", "localhost", "[::1]", "testserver")
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "server_error"}


@dataclass
class Settings:
    """How the interface is offered.

    Args:
        base: the name of the base.
        adapters: the folder of adapters, or None.
        token: what clients must show; None serves this machine alone.
        body: the largest body in bytes.
        drain: seconds that requests under way get when the server stops.
        watch: seconds between looks at the folder; 0 looks once.
        patience: seconds for which a stream's reader may take nothing.
    """

    base: str
    adapters: Path | None = None
    token: str | None = None
    body: int = 4_000_000
    drain: float = 30.0
    watch: float = 1.0
    pinned: frozenset[str] = frozenset()
    patience: float = 60.0


def build(engine: Engine, tokenizer: Any, settings: Settings) -> FastAPI:
    """The application over an engine."""
    service = Service(engine)
    watch = Watch(engine, settings.adapters, settings.pinned, settings.base) if settings.adapters is not None else None

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        if watch is not None and not watch.look():
            log.warning("%s holds no adapter's folder and no run's yet; the base is served", settings.adapters)
        service.start(asyncio.get_running_loop())
        follow = asyncio.create_task(watch.follow(settings.watch)) if watch is not None and settings.watch else None
        try:
            yield
        finally:
            if follow is not None:
                follow.cancel()
            await service.stop(settings.drain)

    errors = {code: {"model": Failure} for code in (400, 401, 403, 404, 413, 429, 503)}
    app = FastAPI(title="Veneer", lifespan=life, docs_url=None, redoc_url=None, responses=errors)
    app.state.service, app.state.metrics = service, Metrics(service)
    app.add_middleware(Limit, most=settings.body)
    _errors(app)
    _open(app, service)
    guard = [Depends(_guard(settings))]
    _openai(app, service, tokenizer, settings, guard)
    _adapters(app, service, settings, guard)
    return app


def failure(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The answer that is an error."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return JSONResponse({"error": {"message": sentence, "type": kind, "code": status}}, status, headers)


def complaint(errors: Sequence[Any]) -> str:
    """What a body's check found, in one sentence.

    Of a field that may be of several types, what is wrong within the type that was given says more than that it is none
    of the others.
    """
    first = next((e for e in errors if e["type"] not in ("string_type", "list_type")), errors[0])
    if first["type"] == "json_invalid":
        return "the body is not valid JSON"
    if first["type"] == "model_attributes_type":
        return "the body must be a JSON object, sent with Content-Type: application/json"
    where = ".".join(str(p) for p in first["loc"] if p != "body" and (isinstance(p, int) or p.isidentifier()))
    said = first["msg"].removeprefix("Value error, ")
    return f"{where[:100]}: {said[:300]}" if where else said[:300]


def _guard(settings: Settings) -> Any:
    """Who may ask: whoever shows the token; without one, this machine, by a local name."""

    async def check(call: Call) -> None:
        if settings.token is not None:
            scheme, _, given = call.headers.get("authorization", "").partition(" ")
            known = secrets.compare_digest(given.strip().encode(), settings.token.encode())
            if scheme.lower() != "bearer" or not known:
                raise HTTPException(401, "the token is missing or wrong; send it as Authorization: Bearer TOKEN")
            return
        client, host = (call.client.host if call.client else ""), call.url.hostname or ""
        if client not in (*LOCAL, "testclient") or host not in LOCAL:
            raise HTTPException(403, "this server has no token and so answers this machine alone, as localhost")

    return check


def _errors(app: FastAPI) -> None:
    @app.exception_handler(UserError)
    async def _mistake(call: Call, error: UserError) -> JSONResponse:
        sentence = str(error)
        return failure(404 if sentence.startswith("there is no ") else 400, sentence)

    @app.exception_handler(Busy)
    async def _busy(call: Call, error: Busy) -> JSONResponse:
        status = 503 if call.app.state.service.draining or call.app.state.service.failure else 429
        return failure(status, str(error), {"Retry-After": str(error.after)})

    @app.exception_handler(Refusal)
    async def _refused(call: Call, error: Refusal) -> JSONResponse:
        if error.reason == "aborted":
            return failure(429, str(error), {"Retry-After": str(call.app.state.service.after())})
        return failure(404 if str(error).startswith("there is no ") else 400, str(error))

    @app.exception_handler(RequestValidationError)
    async def _invalid(call: Call, error: RequestValidationError) -> JSONResponse:
        return failure(400, complaint(error.errors()))

    @app.exception_handler(HTTPException)
    async def _http(call: Call, error: HTTPException) -> JSONResponse:
        plain = {"Not Found": f"there is no {call.url.path[:100]} here"}
        plain["Method Not Allowed"] = f"{call.method} is not possible here"
        sentence = plain.get(error.detail, str(error.detail))
        return failure(error.status_code, sentence, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def _defect(call: Call, error: Exception) -> JSONResponse:
        log.exception("a request failed")
        return failure(500, "the server failed at this request; its log says why")


def _open(app: FastAPI, service: Service) -> None:
    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return PAGE

    @app.get("/health")
    async def health() -> JSONResponse:
        found = facts(service)
        return JSONResponse(found, 200 if found["status"] == "ok" else 503)


def _openai(app: FastAPI, service: Service, tokenizer: Any, settings: Settings, guard: list[Any]) -> None:
    engine = service.engine
    began = int(time.time())

    @app.get("/v1/models", dependencies=guard)
    async def models() -> dict[str, Any]:
        names = [settings.base, *sorted(engine.bank.entries)]
        return {"object": "list", "data": [_model(n, settings, began) for n in names]}

    @app.get("/v1/models/{name}", dependencies=guard)
    async def model(name: str) -> dict[str, Any]:
        blend(name, settings.base, engine.bank.entries)
        return _model(name, settings, began)

    @app.get("/metrics", dependencies=guard)
    async def metrics() -> Response:
        return Response(app.state.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.post("/v1/chat/completions", dependencies=guard)
    async def chat(body: Chat, call: Call) -> Response:
        tokens = prompt_of(tokenizer, [m.flat() for m in body.messages])
        most = body.max_completion_tokens or body.max_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return await respond(body, call, tokens, most, logprobs, chat=True)

    @app.post("/v1/completions", dependencies=guard)
    async def completions(body: Completion, call: Call) -> Response:
        tokens = body.prompt if isinstance(body.prompt, list) else tokenizer(body.prompt)["input_ids"]
        if any(t >= engine.trunk.vocabulary for t in tokens):
            raise UserError(f"the prompt has a token beyond the vocabulary of {engine.trunk.vocabulary}")
        return await respond(body, call, tokens, body.max_tokens, body.logprobs, chat=False)

    async def respond(
        body: Chat | Completion, call: Call, tokens: list[int], most: int | None, logprobs: int | None, chat: bool
    ) -> Response:
        service.check()
        chosen = blend(body.model, settings.base, engine.bank.entries)
        room = engine.trunk.longest - len(tokens)
        sampling = Sampling(
            1.0 if body.temperature is None else body.temperature,
            body.top_p or 1.0,
            body.top_k or 0,
            None if body.seed is None else body.seed % 2**63,
            logprobs,
        )
        limit = most if most is not None else max(1, min(room, 512))
        request = Request(tokens, chosen, limit, sampling, stops=stops_of(tokenizer, engine.trunk.model))
        engine.check(request)
        answer = Answer(service, request, tokenizer, body.model, body.stops, chat)
        if not body.stream:
            try:
                return JSONResponse(await _unless_gone(call, answer.whole()))
            finally:
                _note(app, request, body.model)
        pieces = answer.pieces()
        try:
            first = await _unless_gone(call, anext(pieces, Piece("", finish="stop")))
        except BaseException:
            await pieces.aclose()
            _note(app, request, body.model)
            raise
        events = _noted(app, request, body.model, answer.stream(first, pieces, body.usage))
        return Stream(events, settings.patience)


async def _noted(app: FastAPI, request: Request, model: str, events: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield event
    finally:
        await events.aclose()
        _note(app, request, model)


async def _unless_gone(call: Call, work: Any) -> Any:
    """Await ``work``, and give it up when the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(call))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            raise HTTPException(499, "the client went away")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _disconnect(call: Call) -> None:
    while (await call.receive())["type"] != "http.disconnect":
        pass


def _note(app: FastAPI, request: Request, model: str) -> None:
    """One line of the log and the histograms, for a request that has ended."""
    app.state.metrics.finished(request)
    first = None if request.first is None else round(request.first - request.arrival, 4)
    facts = {
        "event": "request",
        "model": model[:200],
        "prompt": len(request.prompt),
        "generated": len(request.generated),
        "reused": request.reused,
        "first": first,
        "reason": request.reason or ("stop" if request.enough else "cancelled"),
    }
    log.info(json.dumps(facts))


def _model(name: str, settings: Settings, began: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": began, "owned_by": "veneer", "root": settings.base}


def _adapters(app: FastAPI, service: Service, settings: Settings, guard: list[Any]) -> None:
    bank = service.engine.bank

    async def in_engine(work: Any) -> Any:
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def settle(value: Any, error: Exception | None) -> None:
            if not done.done():
                done.set_result(value) if error is None else done.set_exception(error)

        def run() -> None:
            try:
                value, error = work(), None
            except Exception as caught:  # handed to whoever asked
                value, error = None, caught
            loop.call_soon_threadsafe(settle, value, error)

        service.engine.do(run)
        return await done

    def about(name: str) -> dict[str, Any]:
        e = bank.get(name)
        found = {"name": name, "folder": e.folder.name, "state": e.state, "users": e.users, "pinned": e.pinned}
        if e.form:
            found |= {"form": e.form, "rank": e.rank, "error": e.error, "pages": e.size}
        return found | ({"why": e.why} if e.why else {})

    @app.get("/v1/adapters", dependencies=guard)
    async def adapters() -> dict[str, Any]:
        return {"object": "list", "data": [about(name) for name in sorted(bank.entries)]}

    @app.post("/v1/adapters", dependencies=guard)
    async def add(body: Addition) -> dict[str, Any]:
        if settings.adapters is None:
            raise UserError("the server was started without --adapters, so there is no folder to take them from")
        name = checked(body.name or body.folder)
        if name == settings.base:
            raise UserError(f"{name!r} is the name of the base; give the adapter another one")
        folder = inside(settings.adapters, body.folder)

        async def ready() -> dict[str, Any]:
            entry = await in_engine(lambda: bank.add(name, folder, body.pinned))
            while True:
                await in_engine(lambda: bank.want(entry, service.engine.clock()) or bank.settle(service.engine.clock()))
                if entry.state == "ready" or entry.gone:
                    return about(name)
                await asyncio.sleep(0.02)

        return await ready()

    @app.delete("/v1/adapters/{name}", dependencies=guard)
    async def remove(name: str) -> dict[str, Any]:
        await in_engine(lambda: bank.remove(name))
        return {"name": name, "deleted": True}
