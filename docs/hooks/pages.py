"""mkdocs hooks: pages of methods and tables made from the registry and from the results, at build time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from veneer.core import registry
from veneer.report import catalogue, pages

ROOT = Path(__file__).resolve().parents[2]
CLAIMS, RESULTS = ROOT / "bench" / "claims", ROOT / "bench" / "results"
SLOT = re.compile(r"^<!-- made: ([a-z]+) -->$", re.M)


def on_config(config: Any) -> Any:
    """Give every method a place in the navigation, by axis."""
    axes = {axis: [m for m in registry.methods() if m.axis == axis] for axis in catalogue.TITLES}
    entries = [
        {catalogue.TITLES[axis].partition(":")[0]: [{m.name: f"methods/{m.name}.md"} for m in found]}
        for axis, found in axes.items()
        if found
    ]
    for entry in config.nav:
        if "Methods" in entry:
            entry["Methods"] = [{"All methods": "methods.md"}, *entries]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the list of methods and a page for each."""
    claims = pages.claims_by_method(CLAIMS, [m.name for m in registry.methods()])
    made = {"methods.md": pages.methods_page(registry.methods(), claims)}
    for method in registry.methods():
        made[f"methods/{method.name}.md"] = pages.method_page(method, claims.get(method.name, ()))
    for path, text in made.items():
        written = files.get_file_from_path(path)
        if written is not None:
            files.remove(written)
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put the made tables in their places."""
    return SLOT.sub(lambda slot: table(slot.group(1)), markdown)


def table(name: str) -> str:
    """One of the made tables, or words."""
    known = registry.methods()
    if name == "interchange":
        lines = pages.interchange_table(known)
    elif name == "claims":
        names = [m.name for m in known]
        lines = pages.claims_list(pages.claims_by_method(CLAIMS, names), names)
    elif name == "benches":
        lines = pages.benches(pages.records(RESULTS))
    elif name == "machines":
        lines = [pages.machines(pages.records(RESULTS))]
    elif name == "systems":
        lines = pages.table(("name", "stands for"), [[f"`{n}`", f"`{r}`"] for n, r in registry.systems().items()])
    else:
        raise ValueError(f"no table is called {name!r}")
    return "\n".join(lines)
