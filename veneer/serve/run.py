"""Running the server: logs, the socket, signals."""

from __future__ import annotations

import importlib.util
import json
import logging
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


def run(engine: Engine, tokenizer: Any, settings: Settings, host: str, port: int) -> None:
    """Serve until a signal; requests under way get ``settings.drain`` seconds to finish."""
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
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=max(1, int(settings.drain)),
        limit_concurrency=4 * (engine.limits.batch + engine.limits.queue) + 64,
        http="h11",
        h11_max_incomplete_event_size=64 * 1024,
    )
    server = uvicorn.Server(config)
    server.run()
    if not server.started:
        raise UserError(f"cannot listen on {host}:{port}; is another server there? choose another --port")
