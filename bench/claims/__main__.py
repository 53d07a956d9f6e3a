"""``python -m bench.claims [NUMBER|NAME …]``: runs claims; without a name lists what has been found."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

from bench.claims.harness import HERE, parser
from veneer.errors import nearest


def scripts(folder: Path = HERE) -> dict[str, Path]:
    """Claim scripts by number and by name."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("[0-9][0-9][0-9]*_*.py")):
        number, name = path.stem.split("_", 1)
        found[name] = path
        found[path.stem] = path
        found.setdefault(number, path)
    return found


def listing(folder: Path = HERE) -> None:
    """Print every claim that has a result, and those that have none."""
    from rich.table import Table

    from veneer.report.screen import screen

    table = Table("claim", "verdict", "what was found")
    for path in sorted(set(scripts(folder).values())):
        result = path.with_suffix(".json")
        record = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
        table.add_row(path.stem, record.get("verdict", "not run"), record.get("sentence", ""))
    screen().print(table)


def main() -> None:
    """Run what was asked for."""
    made = parser(__doc__)
    made.add_argument("names", nargs="*", metavar="NUMBER|NAME")
    options, known = made.parse_args(), scripts()
    for name in options.names:
        if name not in known:
            made.error(f"there is no claim {name!r}{nearest(name, known)}")
    if not options.names:
        listing()
    rest = ["--out", options.out, *(["--data", options.data] if options.data else []), *["--fresh"] * options.fresh]
    for name in options.names:
        runpy.run_path(str(known[name]))["CLAIM"].main(rest)


if __name__ == "__main__":
    sys.exit(main())
