"""Wall time of the command line's quick commands, from the start of the process to its end."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from bench.harness import Report, alternate, figure, main, parser, repeats, seconds
from veneer.errors import UserError

LIMITS = {"--help": 0.5, "methods": 3.0}  # seconds


def measure(options: argparse.Namespace) -> Report:
    """``veneer --help`` and ``veneer methods`` by turns; one round before them fills the caches of files."""
    program = Path(sys.executable).with_name("veneer")
    if not program.is_file():
        raise UserError(f"there is no program {program}; install Veneer in this environment: make setup")

    def run(argument: str) -> float:
        command = [str(program), argument]
        return seconds(lambda: subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL))

    samples = alternate({name: lambda name=name: run(name) for name in LIMITS}, repeats(options), warm_up=1)
    figures = [figure(f"veneer {name}", samples[name], "s", at_most=limit) for name, limit in LIMITS.items()]
    return Report(figures, {"seconds": samples})


if __name__ == "__main__":
    main("cli", measure, parser(__doc__).parse_args())
