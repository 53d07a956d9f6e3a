"""Running the server: logs, the socket, signals."""

from __future__ import annotations

import importlib.util
import json
import logging
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

from veneer.errors import UserError
from veneer.serve.engine import Engine

if TYPE_CHECKING:
    from veneer.serve.app import Settings

NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}


def packages() -> None:
    """Raise UserError, with the command that helps, when a package that serving needs is missing."""
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f'serving needs {", ".join(missing)}; get what is missing with: pip install "veneer[serve]"')


class Lines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record; a message that is an object already gives its fields."""
        said = record.getMessage()
        fields: dict[str, Any] = {"time": round(time.time(), 3), "level": record.levelname.lower()}
        try:
            found = json.loads(said) if said.startswith("{") else None
        except ValueError:
            found = None
        fields |= found if isinstance(found, dict) else {"event": "log", "message": said}
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the address and does not listen yet; raises UserError when it cannot be had."""
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror}); is another server there? choose another --port"
        ) from None
    return found


def run(engine: Engine, tokenizer: Any, settings: Settings, address: socket.socket) -> None:
    """Serve at a `bound` address until a signal; requests under way get ``settings.drain`` seconds to finish."""
    packages()
    import uvicorn

    from veneer.serve.app import build

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    for name in ("veneer.serve", "uvicorn.error"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(logging.INFO)
    config = uvicorn.Config(
        build(engine, tokenizer, settings),
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=max(1, int(settings.drain)),
        limit_concurrency=4 * (engine.limits.batch + engine.limits.queue) + 64,
        http="h11",
        h11_max_incomplete_event_size=64 * 1024,
    )
    host, port = address.getsockname()[:2]
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    logging.getLogger("veneer.serve").info(json.dumps({"event": "listening", "address": where}))
    uvicorn.Server(config).run(sockets=[address])
