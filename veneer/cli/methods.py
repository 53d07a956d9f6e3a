"""``veneer methods``: the catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from veneer.errors import UserError


def command(
    name: Annotated[
        str | None, typer.Argument(help="One method, in full: paper, hyper-parameters, what it combines with.")
    ] = None,
    axis: Annotated[
        str | None, typer.Option(help="Only one axis: delta, init, ranks, optim, objective, base, side, mixture …")
    ] = None,
    foldable: Annotated[
        bool | None,
        typer.Option("--foldable/--not-foldable", help="Only forms that fold into the weights, or that do not."),
    ] = None,
    exportable: Annotated[
        Literal["peft", "peft-lora", "gguf", "merged"] | None,
        typer.Option(help="Only forms that this format of `veneer export` takes.", show_default=False),
    ] = None,
    layer: Annotated[
        Literal["linear", "conv", "embedding", "parameter", "module"] | None,
        typer.Option(help="Only forms that lie on this kind of layer.", show_default=False),
    ] = None,
    memory: Annotated[
        Literal["thin", "dense", "replaced", "quantised", "side"] | None,
        typer.Option(help="Only what takes this class of memory; one method's page explains it.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="With a name: what it would train in this model.", show_default=False, metavar="M"),
    ] = None,
    sites: Annotated[str, typer.Option(help="With --model: where, as in `veneer train`.")] = "linear",
    rank: Annotated[int | None, typer.Option(min=1, help="With --model: the rank.", show_default="its own")] = None,
) -> None:
    """List the methods of recipes, or describe one."""
    from veneer.core import registry
    from veneer.report.screen import screen

    console = screen()
    if name is not None:
        if any(given is not None for given in (axis, foldable, exportable, layer, memory)):
            raise UserError("filters list methods; with a name there is one to describe, so leave one of the two out")
        _describe(name, model, sites, rank, console)
        return
    if model is not None or rank is not None:
        raise UserError("--model and --rank go with a method's name, as in: veneer methods lora --model smollm2-135m")
    if axis is not None and axis not in registry.AXES:
        raise UserError(f"there is no axis {axis!r}; the axes are {', '.join(registry.AXES)}")
    from veneer.report import catalogue, tables

    found = catalogue.selected(
        registry.methods(axis), foldable=foldable, exportable=exportable, layer=layer, memory_class=memory
    )
    console.print(tables.methods_table(found))
    whole = all(given is None for given in (axis, foldable, exportable, layer, memory))
    for alias, recipe in registry.systems().items() if whole else ():
        console.print(f"{alias} = {recipe}")
    console.print(
        f"[dim]{len(found)} methods; `veneer methods NAME` describes one; a recipe is a sum: lora+pissa[/dim]"
    )


def _describe(name: str, model: str | None, sites: str, rank: int | None, console: Any) -> None:
    import inspect

    from veneer.core import registry
    from veneer.report import catalogue, pages, tables

    named = registry.systems().get(name, name)
    if "+" in named:
        console.print(f"{name} is the sum {named}")
        return
    method = registry.find(named)
    console.print(f"[bold]{method.name}[/bold]  {method.axis}")
    for line in catalogue.declared(method) + catalogue.carried(method):
        console.print(line, markup=False)
    console.print(f"written alone it is: {pages.alone(method)}", markup=False)
    console.print()
    console.print(inspect.cleandoc(method.cls.__doc__ or ""), markup=False)
    rows = catalogue.fields(method)
    if rows:
        console.print()
        console.print(tables.fields_table(rows))
    beside = pages.beside(method.name)
    if beside:
        console.print("\nin a sum with")
        for other, names in beside.items():
            console.print(f"  {other}: {', '.join(names)}", markup=False)
    console.print()
    for line in _claims(method.name):
        console.print(line, markup=False)
    if model is not None:
        _count(method, model, sites, rank, console)


def _claims(name: str) -> list[str]:
    """What the paper claims and what was seen of it here; the results lie beside the sources, not in a wheel."""
    import veneer
    from veneer.core import registry
    from veneer.report import pages

    folder = Path(veneer.__file__).parents[1] / "bench" / "claims"
    if not folder.is_dir():
        return ["its claim: tried in the repository's bench/claims, which is not installed here"]
    found = pages.claims_by_method(folder, [m.name for m in registry.methods()], only=name).get(name, [])
    return [line for r in found for line in (f"its claim: {r['claim']}", f"  {r['sentence']}")] or [
        "its claim: not tried yet"
    ]


def _count(method: Any, model: str, sites: str, rank: int | None, console: Any) -> None:
    """What the form that the method brings, or stands on, would train in a model."""
    import veneer
    from veneer.core.recipe import parse
    from veneer.report import catalogue, tables

    base, _ = veneer.load_model(model)
    form = "+".join(part.method.name for part in parse(method.name).parts if part.method.axis in catalogue.FORMS)
    try:
        adapter = veneer.attach(base, form, sites=sites, rank=rank)
    except UserError as refused:
        console.print(f"\nin {model}: {refused}", markup=False, soft_wrap=True)
        return
    console.print(f"\n{form} in {model}: {tables.share_line(adapter)}", markup=False)
    console.print(tables.sites_table(adapter))
    console.print(f"{4 * adapter.parameter_count() / 2**20:.2f} MiB of fp32")
