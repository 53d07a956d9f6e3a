"""``veneer serve``: many adapters on one base, for OpenAI's clients."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from veneer.cli.options import Model

LOCAL = ("127.0.0.1", "localhost", "::1")


def command(
    model: Model,
    adapters: Annotated[
        str | None,
        typer.Option(
            help="A folder of adapters' folders, ours or PEFT's; it is followed while serving.",
            show_default=False,
            metavar="DIR",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; other than this machine only with a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen.")] = 8000,
    token: Annotated[
        str | None, typer.Option(envvar="VENEER_TOKEN", help="What clients must show.", show_default=False)
    ] = None,
    memory: Annotated[float, typer.Option(min=0.001, help="Of the pool for requests and adapters, in GB.")] = 1.0,
    batch: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 32,
    queue: Annotated[int, typer.Option(min=0, help="Requests that wait; more are told when to come again.")] = 256,
    chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens a step, so that long prompts stall nobody.")] = 256,
    policy: Annotated[
        Literal["fcfs", "lifo", "clustering", "abort", "fair"],
        typer.Option(help="Who is next; abort refuses who would wait too long, fair shares between adapters."),
    ] = "fair",
    deadline: Annotated[float, typer.Option(min=0.1, help="Of the first token, in seconds, for abort.")] = 6.0,
    eviction: Annotated[Literal["lru", "cost"], typer.Option(help="Which idle adapter leaves the pool.")] = "lru",
    pin: Annotated[
        list[str] | None, typer.Option(help="An adapter that stays in the pool.", show_default=False)
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The base's name for clients; that of --model.", show_default=False)
    ] = None,
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], typer.Option(help="Of the computation.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Cores to compute on.", show_default=False)] = None,
    replicas: Annotated[
        int, typer.Option(min=1, help="Servers with a copy of the base each, under Ray Serve; routed by adapter.")
    ] = 1,
    drain: Annotated[float, typer.Option(min=0, help="Seconds for requests under way when it is stopped.")] = 30.0,
    check: Annotated[bool, typer.Option("--check", help="Say what will fit, and serve nothing.")] = False,
) -> None:
    """Serve one base with any number of adapters, as OpenAI's interface.

    An adapter's name is a model's name; a*0.7+b*0.3 blends two. A page to try them is at /.
    """
    from pathlib import Path

    from veneer.errors import UserError
    from veneer.report.screen import screen

    root = None if adapters is None else Path(adapters)
    if root is not None and not root.is_dir():
        raise UserError(f"--adapters {adapters} is no folder; give the one that holds the adapters' folders")
    if token is None and host not in LOCAL:
        raise UserError(f"--host {host} lets other machines ask; set --token or VENEER_TOKEN, or leave --host out")
    from veneer.serve.check import check as look
    from veneer.serve.run import bound, packages, run
    from veneer.serve.start import Start

    start = Start(model, dtype, memory, batch, queue, chunk, policy, deadline, eviction, threads)
    if check:
        import transformers.models.llama  # noqa: F401

        from veneer.serve.mapped import resident

        libraries = resident()
        trunk, pages, _ = start.trunk()
        plan = look(trunk, root, pages, batch, chunk)
        said = plan.lines(batch, min(512, trunk.longest), libraries)
        screen().print("\n".join(said), markup=False, highlight=False)
        return
    packages()
    from veneer.serve.app import Settings

    settings = Settings(name or Path(model).name, root, token, drain=drain, pinned=frozenset(pin or ()))
    if replicas > 1:
        from veneer.serve import replicas as several

        several.run(start, settings, replicas, host, port)
        return
    with bound(host, port) as address:  # before the model is read, which takes long
        engine, tokenizer = start.engine()
        run(engine, tokenizer, settings, address)
