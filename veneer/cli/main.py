"""The entry point: collects the commands and turns what goes wrong into one sentence and an exit status."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from veneer.cli import chat, compare, data, demo, eval, export, inspect, methods, plan, serve, train
from veneer.errors import UserError
from veneer.train.interrupt import Interrupted

USER, INTERRUPTED = 2, 130
# What the parser raises for a wrong option or argument; typer does not export the class itself, only this child.
Refused = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    name="veneer",
    help="Adapt pretrained models with thin learned layers.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes leave the sentences no room, and their packages take a third of the time
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, train, compare, plan, inspect, data, eval, chat, export, serve, methods):
    app.command(name=command.__name__.rpartition(".")[2])(command.command)


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 2 a mistake of the user's, 130 interrupted.

    A mistake and a full disk are one sentence on standard error; any other exception is a defect of Veneer and
    keeps its traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = app(args=given or ["--help"], prog_name="veneer", standalone_mode=False)
    except UserError as error:
        _leave(str(error), USER)
    except Refused as error:
        context = getattr(error, "ctx", None)
        said = error.format_message().replace("Value error, ", "").replace(". Did you", "; did you").rstrip(".")
        _leave(f"{said[:1].lower()}{said[1:]} (see {context.command_path if context else 'veneer'} --help)", USER)
    except Interrupted as stop:
        _leave(stop.sentence, stop.code)
    except (KeyboardInterrupt, typer.Abort):
        _leave("interrupted", INTERRUPTED)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _leave(f"no space is left on the disk of {error.filename or os.getcwd()}; free some and run again", USER)
        if error.errno == errno.EPIPE:  # the reader of our output has closed it, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None
        raise
    if status == INTERRUPTED:
        _leave("interrupted", INTERRUPTED)
    raise SystemExit(status if isinstance(status, int) else 0)


def _leave(sentence: str, status: int) -> NoReturn:
    print(f"veneer: {sentence}", file=sys.stderr)
    raise SystemExit(status)
