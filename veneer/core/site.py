"""Sites: the places of a model that can be adapted, seen as dense out × in maps whatever the layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import UserError, nearest
from veneer.models import architecture
from veneer.models.layers import CONVOLUTIONS, convolve, dimensions, patches, shape, type_named

Kind = Literal["linear", "conv", "embedding", "parameter", "module"]
Select = str | Iterable[str] | Callable[["Site"], bool]

_storage: dict[type, Callable[[nn.Module], Tensor]] = {}


def register_storage(module_type: type, dequantise: Callable[[nn.Module], Tensor]) -> None:
    """Say how the dense (out, in) weight of a quantised or factored layer is had."""
    _storage[module_type] = dequantise


def stored(module: nn.Module) -> Callable[[nn.Module], Tensor] | None:
    """The dequantiser of a module whose weight is not a dense parameter, or None."""
    return next((f for t, f in _storage.items() if isinstance(module, t)), None)


@dataclass(eq=False)
class Site:
    """One adaptable place of a model.

    W is the dense view (out_features, in_features): a convolution's kernel flattened to out × (in/groups·k…), an
    embedding's table transposed to dim × vocabulary, a Conv1D's weight transposed. ``rows`` is the row range when
    the place is one part of a fused projection, ``name`` the tensor's name at a parameter site, ``parts`` the inner
    layers by role at a module site, ``heads`` the number of attention heads behind q and o (key-value heads: k, v).
    """

    path: str
    module: nn.Module
    kind: Kind
    out_features: int = 0
    in_features: int = 0
    block: int | None = None
    role: str = "other"
    rows: slice | None = None
    name: str | None = None
    heads: int | None = None
    parts: dict[str, Site] = field(default_factory=dict)
    index: int = 0

    @property
    def module_path(self) -> str:
        """The path of the module itself, without row or tensor name."""
        if self.name is not None:
            return self.path.rpartition(".")[0]
        return self.path.partition("[")[0]

    def named(self, name: str) -> bool:
        """Whether a glob or a name fits the path or its last parts."""
        paths = (f".{path}" for path in (self.path, self.module_path))
        # a row part's brackets are no glob's: its name is compared as it stands
        return any(p.endswith(f".{name}") or fnmatchcase(p, f"*.{name}") for p in paths)

    @property
    def transposed(self) -> bool:
        """Whether the layer stores its weight as in × out (transformers' Conv1D, an embedding)."""
        return isinstance(self.module, nn.Embedding) or type_named(self.module, "Conv1D")

    def weight(self) -> Tensor:
        """The dense (out, in) view of W: no copy where the layer stores it so; dequantised on demand."""
        if self.name not in (None, "weight"):
            return getattr(self.module, self.name)
        dequantise = stored(self.module)
        W = dequantise(self.module) if dequantise else self.module.weight
        if self.name is not None:
            return W
        W = W.T if self.transposed else W.flatten(1)
        return W if self.rows is None else W[self.rows]

    def bias(self) -> Tensor | None:
        """The layer's bias (out,), or None."""
        b = getattr(self.module, "bias", None)
        return b if b is None or self.rows is None else b[self.rows]

    def write(self, W: Tensor) -> None:
        """Copy a dense (out, in) matrix into the layer's own storage."""
        m = self.module
        with torch.no_grad():
            if m.weight.numel() == 0:  # a base that was dropped
                m.weight.data = (W.T if self.transposed else W).to(m.weight.dtype).contiguous()
            else:
                self.weight().copy_(W)

    def run(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        """Apply a dense (out, in) matrix, and a bias, as the layer applies its own."""
        m, W = self.module, W if not x.is_floating_point() else W.to(x.dtype)
        if self.kind == "embedding":
            y = F.embedding(x, W.T, m.padding_idx) * getattr(m, "embed_scale", 1.0)
            return y if b is None else y + b
        b = b if b is None else b.to(x.dtype)
        if self.kind == "conv":
            return convolve(m, x, W, b, m.groups)
        return F.linear(x, W, b)

    def project(self, x: Tensor, A: Tensor) -> Tensor:
        """Apply A (r, in) to the layer's input: (…, r) with channels last, whatever the layer."""
        if self.kind == "embedding":
            return F.embedding(x, A.T, self.module.padding_idx)
        if self.kind == "conv":
            if self.module.groups > 1:
                raise UserError(f"{self.path} is a grouped convolution: its update has no factored form")
            return convolve(self.module, x, A, None, 1).movedim(-1 - dimensions(self.module), -1)
        return F.linear(x, A)

    def lift(self, h: Tensor, B: Tensor) -> Tensor:
        """Apply B (out, r) to h (…, r): the layout of the layer's output."""
        y = F.linear(h, B)
        if self.kind == "embedding":
            return y * getattr(self.module, "embed_scale", 1.0)  # Gemma's
        return y.movedim(-1, -1 - dimensions(self.module)) if self.kind == "conv" else y

    def input_rows(self, x: Tensor) -> Tensor:
        """The layer's input as rows (positions, in): the weight's gradient is ``output_rows(g)ᵀ · input_rows(x)``."""
        if self.kind == "embedding":
            return F.one_hot(x.reshape(-1), self.in_features).float()
        if self.kind == "conv":
            return patches(self.module, x)
        return x.reshape(-1, x.shape[-1])

    def output_rows(self, y: Tensor) -> Tensor:
        """The layer's output, or its gradient, as rows (positions, out)."""
        y = y.flatten(2).transpose(1, 2) if self.kind == "conv" else y
        y = y.reshape(-1, y.shape[-1])
        return y if self.rows is None else y[:, self.rows]

    def factored(self) -> bool:
        """Whether project and lift apply here (not at a grouped convolution)."""
        return not (self.kind == "conv" and self.module.groups > 1)


WORDS: dict[str, Callable[[Site], bool]] = {
    "linear": lambda s: s.kind == "linear" and s.role != "head",
    "attention": lambda s: s.role in ("q", "k", "v", "o"),
    "mlp": lambda s: s.role in ("gate", "up", "down"),
    "conv": lambda s: s.kind == "conv",
    "embedding": lambda s: s.kind == "embedding",
    "all": lambda s: True,
}


def all_sites(model: nn.Module) -> list[Site]:
    """Every linear, convolution and embedding layer of the model as sites, fused projections split by role."""
    sites: list[Site] = []
    for path, module in model.named_modules():
        if ".veneer." in f".{path}." or "veneer_shared" in path:
            continue
        kind = _kind(module)
        if kind is None:
            continue
        fused = architecture.fused_rows(path, module, model) if kind == "linear" else None
        whole = site_at(model, path, module, kind)
        if not fused:
            sites.append(whole)
            continue
        for role, rows in fused.items():
            sites.append(
                Site(
                    f"{path}[{role}]", module, kind, rows.stop - rows.start, whole.in_features, whole.block, role, rows
                )
            )
            sites[-1].heads = architecture.heads(model, role)
    return sites


def site_at(model: nn.Module, path: str, module: nn.Module | None = None, kind: Kind | None = None) -> Site:
    """The site of the whole layer or module at ``path``."""
    module = model.get_submodule(path) if module is None else module
    kind = kind or _kind(module) or "module"
    role = architecture.role(path, module, model)
    out, inn = shape(module) if kind in ("linear", "conv", "embedding") else (0, 0)
    return Site(
        path, module, kind, out, inn, architecture.block_index(path), role, heads=architecture.heads(model, role)
    )


def parameter_site(model: nn.Module, path: str) -> Site:
    """The site of one tensor, ``path`` being its name; a bias that the layer lacks counts as zeros."""
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    role = name if name == "bias" else architecture.role(owner, module, model)
    return Site(path, module, "parameter", block=architecture.block_index(path), role=role, name=name)


def module_site(model: nn.Module, path: str, parts: dict[str, nn.Module] | None = None) -> Site:
    """The site of a whole module (MLP, block, trunk) with its inner layers by role."""
    names = {m: n for n, m in model.named_modules()}
    site = site_at(model, path, kind="module")
    site.parts = {role: site_at(model, names[m], m) for role, m in (parts or {}).items()}
    return site


def inner_sites(sites: list[Site]) -> list[Site]:
    """The sites, whole modules given by their inner layers."""
    return [p for s in sites for p in (s.parts.values() if s.parts else [s])]


def _kind(module: nn.Module) -> Kind | None:
    if isinstance(module, nn.Linear) or type_named(module, "Conv1D") or stored(module):
        return "linear"
    if isinstance(module, CONVOLUTIONS):
        return "conv"
    return "embedding" if isinstance(module, nn.Embedding) else None


def find_sites(model: nn.Module, select: Select = "linear") -> list[Site]:
    """The sites that ``select`` names: a word, a glob, a regular expression, a list of them or a function.

    Words: ``linear`` (every linear layer but the output head), ``attention``, ``mlp``, ``conv``, ``embedding``,
    ``all`` (every layer). A glob or a name matches a path or its last parts; a regular expression starts with ``^``
    or is written ``re:…``. Raises UserError, listing what there is, when the selection or a name in it matches nothing.
    """
    sites = all_sites(model)
    if callable(select):
        chosen = [s for s in sites if select(s)]
        _require(chosen, "the function", sites)
        return chosen
    head, keep = architecture.head(model), set()
    for name in [select] if isinstance(select, str) else list(select):
        hits = [i for i, s in enumerate(sites) if _matches(s, name, head)]
        _require(hits, repr(name), sites)
        keep.update(hits)
    return [s for i, s in enumerate(sites) if i in keep]


def _matches(site: Site, name: str, head: nn.Module | None) -> bool:
    if name in WORDS:
        return WORDS[name](site) and (name != "linear" or site.module is not head)
    if name.startswith(("^", "re:")):
        return re.search(name.removeprefix("re:"), site.path) is not None
    if name == site.role:
        return True
    return site.named(name)


def _require(hits: list, name: str, sites: list[Site]) -> None:
    if hits:
        return
    last = sorted({s.path.rpartition(".")[2] for s in sites})
    shown = ", ".join(last[:24]) or "no linear, convolution or embedding layer at all"
    raise UserError(f"sites={name} matches nothing{nearest(name.strip(chr(39)), last)}; the model has: {shown}")
