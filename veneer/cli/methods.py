"""``veneer methods``: the catalogue."""

from __future__ import annotations

from typing import Annotated

import typer

from veneer.errors import UserError


def command(
    name: Annotated[
        str | None, typer.Argument(help="One method, in full: paper, hyper-parameters, what it combines with.")
    ] = None,
    axis: Annotated[
        str | None, typer.Option(help="Only one axis: delta, init, ranks, optim, objective, base, side, mixture …")
    ] = None,
) -> None:
    """List the methods of recipes, or describe one."""
    import inspect

    from veneer.core import registry
    from veneer.report import catalogue, tables
    from veneer.report.screen import screen

    console = screen()
    if name is None:
        if axis is not None and axis not in registry.AXES:
            raise UserError(f"there is no axis {axis!r}; the axes are {', '.join(registry.AXES)}")
        found = registry.methods(axis)
        console.print(tables.methods_table(found))
        for name, recipe in {} if axis else registry.systems().items():
            console.print(f"{name} = {recipe}")
        console.print(
            f"[dim]{len(found)} methods; `veneer methods NAME` describes one; a recipe is a sum: lora+pissa[/dim]"
        )
        return
    named = registry.systems().get(name, name)
    if "+" in named:
        console.print(f"{name} is the sum {named}")
        return
    method = registry.find(named)
    console.print(f"[bold]{method.name}[/bold]  {method.axis}")
    for line in catalogue.declared(method):
        console.print(line, markup=False)
    console.print()
    console.print(inspect.cleandoc(method.cls.__doc__ or ""), markup=False)
    rows = catalogue.fields(method)
    if rows:
        console.print()
        console.print(tables.fields_table(rows))
