"""``veneer inspect``: what a model offers, what an adapter did to it, how two adapters differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from veneer.cli.options import Model


def command(
    model: Model,
    adapters: Annotated[
        list[str] | None, typer.Argument(help="None: the model's sites; one: what it did; two: side by side.")
    ] = None,
    spectra: Annotated[bool, typer.Option("--spectra", help="Without adapters: spectra of the weights.")] = False,
    limits: Annotated[
        bool, typer.Option("--limits", help="Attention scores, and on which side of the norm threshold they lie.")
    ] = False,
    text: Annotated[
        str | None, typer.Option(help="A text for --limits.", show_default="Python's language reference")
    ] = None,
    length: Annotated[int, typer.Option(min=8, help="Tokens of that text.")] = 256,
    top: Annotated[int, typer.Option(min=1, help="Leading singular directions looked at in each matrix.")] = 10,
    epsilon: Annotated[float, typer.Option(help="Cosine below which a direction is an intruder.")] = 0.5,
    side: Annotated[
        Literal["left", "right", "both"], typer.Option(help="Whose cosines: left or right singular vectors, or both.")
    ] = "left",
    shrink: Annotated[
        float | None, typer.Option(help="Scale the intruders by this; needs --save.", show_default=False, metavar="F")
    ] = None,
    save: Annotated[
        str | None, typer.Option(help="Folder for the adapter that --shrink gives.", show_default=False)
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Bring that adapter back to a rank.", show_default="it grows")
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="Held-out rows: score factors from 1 to 0 on them, and forgetting.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also where the adapter was made on another base.")] = False,
    out: Annotated[str | None, typer.Option(help="Write everything as JSON there.", show_default=False)] = None,
    plots: Annotated[str | None, typer.Option(help="Folder for pictures (PNG).", show_default=False)] = None,
) -> None:
    """Look into a model, an adapter, or two adapters: sites, drift, spectra, intruder dimensions, limits, warnings."""
    import torch

    import veneer
    from veneer.analysis import inspection
    from veneer.errors import UserError
    from veneer.io.files import write_json
    from veneer.report import inspection as shown
    from veneer.report.screen import screen

    given = list(adapters or [])
    _check(given, spectra, shrink, save, rank, sweep)
    base, tokenizer = veneer.load_model(model, dtype=torch.float32)
    ids = _text(model, tokenizer, text, length) if limits else None
    console = screen()
    loaded = {folder: _loaded(base, folder, f"a{i}", force) for i, folder in enumerate(given)}
    found: dict[str, Any] = {}
    if not given:
        found |= _model(base, console, spectra)
        if ids is not None:
            found |= _limits(base, None, ids, console)
    for folder, adapter in loaded.items():
        with console.status(f"looking at {folder}"):
            report = inspection.inspect(adapter, top, epsilon, side)
        wrong = inspection.another_base(adapter, folder)
        report["warnings"] += [wrong] if wrong else []
        found.setdefault("adapters", {})[folder] = report
        console.print(f"{folder}: {report['recipe']}, {report['parameters']:,} parameters")
        console.print(shown.adapter_table(report["blocks"]))
        console.print()
        console.print(shown.adapter_table(report["roles"], "role"))
        console.print()
        totals = report["totals"]
        grouped = f", {totals['grouped']} of them among near-equal directions of the base" if totals["grouped"] else ""
        console.print(
            f"{totals['intruders']} intruder{'s' * (totals['intruders'] != 1)} among {totals['looked_at']} directions "
            f"({100 * totals['energy']:.1f} % of their energy){grouped}; mean drift {100 * totals['drift']:.2f} %"
        )
        for warning in report["warnings"]:
            console.print(f"warning: {warning}")
        if ids is not None:
            report |= _limits(base, adapter, ids, console)
    if len(loaded) == 2:
        pairs = found["compared"] = inspection.compared(*loaded.values())
        roles = {row["path"]: row["role"] for report in found["adapters"].values() for row in report["sites"]}
        console.print(shown.pairs_table(pairs, roles))
        cosine, overlap = (sum(p[k] for p in pairs) / len(pairs) for k in ("cosine", "overlap"))
        console.print(f"{len(pairs)} common sites: mean cosine {cosine:.3f}, mean subspace overlap {overlap:.3f}")
    if shrink is not None:
        how = {"k": top, "epsilon": epsilon, "side": side}
        found["shrunk"] = _shrunk(loaded[given[0]], Path(str(save)), shrink, how | {"rank": rank}, console)
    if sweep is not None:
        found["tried"] = _tried(loaded[given[0]], tokenizer, sweep, (top, epsilon, side), console)
    if plots is not None:
        paths = shown.save_pictures(found, plots)
        if not paths:
            raise UserError("there is nothing to draw of a model alone; give --spectra, --limits or an adapter")
        console.print(f"pictures: {', '.join(map(str, paths))}", soft_wrap=True)
    if out is not None:
        write_json(Path(out), json.loads(json.dumps(found)))
        console.print(f"written to {out}", soft_wrap=True)


def _check(
    given: list[str], spectra: bool, shrink: float | None, save: str | None, rank: int | None, sweep: str | None
) -> None:
    from veneer.errors import UserError

    if len(given) > 2:
        raise UserError(f"{len(given)} adapters were given; inspect looks at one or compares two")
    if len(set(given)) < len(given):
        raise UserError(f"{given[0]} was given twice; give two adapters")
    for folder in given:
        if not Path(folder).is_dir():
            raise UserError(f"there is no adapter folder {folder}")
    if spectra and given:
        raise UserError("--spectra is for a model alone; the spectra of an adapter's changes are shown as they are")
    if (shrink is None) != (save is None):
        raise UserError("--shrink and --save go together: by how much, and where to")
    if shrink is not None and len(given) != 1:
        raise UserError(f"--shrink takes one adapter, and {len(given)} were given")
    if rank is not None and shrink is None:
        raise UserError("--rank is that of the adapter that --shrink gives; the two go together")
    if sweep is not None and len(given) != 1:
        raise UserError(f"--sweep takes one adapter, and {len(given)} were given")
    if sweep is not None and not Path(sweep).exists():
        raise UserError(f"--sweep: there is no file {sweep}")
    if save is not None and Path(save).exists():
        raise UserError(f"{save} exists already; name a folder that does not")


def _loaded(base: Any, folder: str, name: str, force: bool) -> Any:
    import veneer

    return veneer.load(base, folder, name=name, force=force)


def _text(model: str, tokenizer: Any, text: str | None, length: int) -> Any:
    from veneer.analysis.forgetting import general_text, pieces
    from veneer.errors import UserError

    if tokenizer is None:
        raise UserError(f"{model} holds no tokenizer; --limits needs one to read a text")
    return pieces(general_text(text), tokenizer, rows=2, length=length)


def _model(base: Any, console: Any, spectra: bool) -> dict[str, Any]:
    from veneer.analysis import inspection
    from veneer.core.site import all_sites
    from veneer.report import inspection as shown
    from veneer.report import tables

    sites = all_sites(base)
    rows = [{"role": s.role, "kind": s.kind, "shape": f"{s.out_features} × {s.in_features}"} for s in sites]
    console.print(tables.counted_table(rows))
    facts = ("path", "kind", "role", "block", "out_features", "in_features")
    found: dict[str, Any] = {"sites": [{name: getattr(site, name) for name in facts} for site in sites]}
    if spectra:
        with console.status("decomposing the weights"):
            found["spectra"] = inspection.spectra(sites)
        console.print("\neffective rank over full rank, and the largest singular value")
        console.print(shown.spectra_table(found["spectra"]))
    return found


def _limits(base: Any, adapter: Any, ids: Any, console: Any) -> dict[str, Any]:
    from veneer.analysis import score_norms
    from veneer.report import inspection as shown

    with console.status("running the text"):
        report = score_norms.norm_report(base, ids, adapter)
        lengths = [n for n in (ids.shape[1] // 4, ids.shape[1] // 2) if n >= 8]
        report["lengths"] = [] if adapter is not None else score_norms.sweep(base, ids, [*lengths, ids.shape[1]])
    console.print(
        "\nattention scores S = β·QKᵀ against ln L (arXiv:2406.03136): above it no sub-quadratic gradient can be "
        "guaranteed, which does not make an approximation useless; the theorem has no constants, the bounds are ours"
    )
    console.print(shown.layers_table(report))
    console.print(report["words"])
    if report["lengths"]:
        console.print(shown.lengths_table(report["lengths"]))
    return {"limits": report}


def _tried(adapter: Any, tokenizer: Any, rows: str, how: tuple[int, float, Any], console: Any) -> dict[str, Any]:
    """Factors from 1 to 0 scored on held-out rows and on general text, each beside its control."""
    from veneer.analysis.forgetting import general_text, pieces, text_loss
    from veneer.analysis.loading import row_scorer
    from veneer.analysis.mitigation import FACTORS, tried
    from veneer.report import inspection as shown

    held_out, ids = row_scorer(adapter.model, tokenizer, rows), pieces(general_text(None), tokenizer)
    with console.status("scoring factors"):
        found = tried(
            adapter,
            lambda: {"held-out loss": held_out(), "loss on general text": text_loss(adapter.model, ids)},
            FACTORS,
            *how,
        )
    console.print("\nintruders scaled; in brackets the whole change, scaled to the same norm")
    console.print(shown.tried_table(found))
    return found


def _shrunk(adapter: Any, folder: Path, factor: float, how: dict[str, Any], console: Any) -> dict[str, Any]:
    from veneer.analysis.intruders import mitigated
    from veneer.io.files import staged, write_json, write_tensors
    from veneer.io.peft_config import CONFIG, TENSORS
    from veneer.io.peft_write import lora

    factors, facts = mitigated(adapter, factor, **how)
    config, tensors = lora(adapter, factors)
    with staged(folder, last=(CONFIG,)) as scratch:
        write_tensors(scratch / TENSORS, tensors)
        write_json(scratch / CONFIG, dict(sorted(config.items())))
    lost = "" if how["rank"] is None else f" (which cuts off {100 * facts['lost']:.2g} % of the squared change)"
    console.print(
        f"{facts['intruders']} intruders in {facts['layers']} layers scaled by {factor:g}: {folder}, plain LoRA "
        f"of ranks up to {facts['rank']}{lost}; the whole change times {facts['uniform']:.3f} has the same norm: "
        "compare with that",
        soft_wrap=True,
    )
    return facts
