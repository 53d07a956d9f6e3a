"""``veneer inspect``: what a model offers, what an adapter did to it, how two adapters differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.options import Model


def command(
    model: Model,
    adapters: Annotated[
        list[str] | None, typer.Argument(help="None: the model's sites; one: what it did; two: side by side.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Leading singular directions looked at in each matrix.")] = 10,
    epsilon: Annotated[float, typer.Option(help="Cosine below which a direction is an intruder.")] = 0.5,
    force: Annotated[bool, typer.Option("--force", help="Also where the adapter was made on another base.")] = False,
    out: Annotated[str | None, typer.Option(help="Write everything as JSON there.", show_default=False)] = None,
) -> None:
    """Look into a model, an adapter, or two adapters: sites, drift, spectra, intruder dimensions, warnings."""
    import torch

    import veneer
    from veneer.analysis import inspection
    from veneer.core.site import all_sites
    from veneer.errors import UserError
    from veneer.io.files import write_json
    from veneer.report import tables
    from veneer.report.screen import screen

    given = list(adapters or [])
    if len(given) > 2:
        raise UserError(f"{len(given)} adapters were given; inspect looks at one or compares two")
    for folder in given:
        if not Path(folder).is_dir():
            raise UserError(f"there is no adapter folder {folder}")
    base, _ = veneer.load_model(model, dtype=torch.float32)
    console = screen()
    if not given:
        rows = [
            {"role": s.role, "kind": s.kind, "shape": f"{s.out_features} × {s.in_features}"} for s in all_sites(base)
        ]
        console.print(tables.counted_table(rows))
        found: dict = {"sites": [vars_of(s) for s in all_sites(base)]}
    else:
        loaded = [veneer.load(base, folder, name=f"a{i}", force=force) for i, folder in enumerate(given)]
        found = {}
        for folder, adapter in zip(given, loaded):
            found[folder] = report = inspection.inspect(adapter, top, epsilon)
            console.print(f"{folder}: {report['recipe']}, {report['parameters']:,} parameters")
            console.print(tables.blocks_table(report["blocks"]))
            totals = report["totals"]
            console.print(
                f"{totals['intruders']} intruders among {totals['looked_at']} leading directions "
                f"({100 * totals['energy']:.1f} % of their energy), mean drift {100 * totals['drift']:.2f} %"
            )
            for warning in report["warnings"]:
                console.print(f"warning: {warning}")
        if len(loaded) == 2:
            pairs = inspection.compared(*loaded)
            found["compared"] = pairs
            cosine, shared = (sum(p[k] for p in pairs) / len(pairs) for k in ("cosine", "overlap"))
            console.print(f"{len(pairs)} common sites: mean cosine {cosine:.3f}, mean subspace overlap {shared:.3f}")
    if out is not None:
        write_json(Path(out), json.loads(json.dumps(found)))
        console.print(f"written to {out}", soft_wrap=True)


def vars_of(site: object) -> dict:
    """A site's facts as JSON values."""
    return {k: getattr(site, k) for k in ("path", "kind", "role", "block", "out_features", "in_features")}
