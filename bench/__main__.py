"""``python -m bench [NAME …]``: every bench, each in a process of its own, then one table and ``results/summary.json``.

A bench that cannot run says why in one sentence, the others go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from bench.harness import RESULTS, ROOT, parser, say, show, write
from veneer.errors import nearest

BENCHES = ("step", "memory_kept", "job", "forms", "starts", "optim", "memory", "plan", "cli", "load", "serve")


def run(name: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """Run one bench; gives what it wrote to ``results/NAME.json``, None when it failed."""
    flags = ["--quick"] if options.quick else []
    if options.repeats:
        flags += ["--repeats", str(options.repeats)]
    if name == "job":
        flags += [] if options.quick else ["--fp32"]
        flags += ["--data", options.data] if options.data else []
    path = RESULTS / f"{name}.json"
    path.unlink(missing_ok=True)
    say(f"bench {name}")
    done = subprocess.run([sys.executable, "-m", f"bench.{name}", *flags], cwd=ROOT, stdout=subprocess.DEVNULL)
    if done.returncode or not path.is_file():
        say(f"bench {name} failed with status {done.returncode}")
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> int:
    """Run what was asked for; gives the exit status."""
    made = parser(__doc__)
    made.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHES)}; all when none is given")
    made.add_argument("--data", help="JSONL of the job bench (see python -m bench.job --help)")
    options = made.parse_args()
    for name in options.names:
        if name not in BENCHES:
            made.error(f"there is no bench {name!r}; there are {', '.join(BENCHES)}{nearest(name, BENCHES)}")
    names = options.names or list(BENCHES)
    found = {name: run(name, options) for name in names}
    records = [record for record in found.values() if record is not None]
    show(records)
    say(f"written to {write('summary', {'benches': found})}")
    return 0 if len(records) == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
