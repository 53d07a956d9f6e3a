"""Reading an adapter's folder into pieces for the pool: plain pairs straight from the file, other forms by lowering.

LoRA (rsLoRA too) and DoRA, ours or PEFT's, with or without an offset beneath, are read from their tensors alone and
served exactly. Every other form that folds is attached to the base for a moment: what is plain LoRA in effect is taken
so, exactly; of the rest the change of each weight is cut to ``rank`` by its singular values, and the error is stated.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer.errors import UserError
from veneer.io.files import read_json, typed
from veneer.io.native import RECIPE
from veneer.io.native import TENSORS as OURS
from veneer.io.peft_config import CONFIG, PLAIN_STARTS, PREFIX, Config, read_config
from veneer.io.peft_config import TENSORS as PEFT
from veneer.numerics.norms import row_norms, row_squares
from veneer.serve.layout import Layout, Piece, Place
from veneer.serve.route import Names, Packed, Route, Scratch, finite, header, payload
from veneer.serve.trunk import Inner, Trunk

RUN, ADAPTER = "run.json", "adapter"  # of a run's folder, as training leaves it
PLAIN_FORMS = ("lora", "rslora", "dora")
ROUTES = 64  # ways of laying out a file that are remembered
_ENDINGS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}


@dataclass
class Loose:
    """The change of one layer as it is found: pairs (A, B, scale), a magnitude, a change of the bias.

    ``names`` says which tensors of the file a single pair is that is all there is.
    """

    pairs: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    names: Names | None = None


@dataclass
class Found:
    """An adapter ready to lay out; ``error`` is ‖ΔW − served‖/‖ΔW‖ over all weights, 0 when it is served exactly.

    ``names`` are its tensors by row range and layer, where each layer has one pair and nothing else.
    """

    pieces: dict[Place, Piece]
    form: str
    error: float = 0.0
    names: dict[Place, dict[int, Names]] | None = None

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(p.rank for p in self.pieces.values())


class Reader:
    """Reads adapters for one trunk; one at a time where a form must be attached.

    Args:
        trunk: the base.
        rank: to which a form is cut that is no pair.
        tolerance: the largest error of that with which an adapter is accepted.
    """

    def __init__(self, trunk: Trunk, rank: int = 64, tolerance: float = 0.5) -> None:
        self.trunk, self.rank, self.tolerance = trunk, rank, tolerance
        self._attached = threading.Lock()
        self._routes: OrderedDict[Hashable, Route] = OrderedDict()
        self._scratch = Scratch()
        self._squares: dict[Inner, Tensor] = {}
        self._base: str | None = None
        self._looked = False

    def packed(self, folder: str | Path, size: int, dtype: torch.dtype) -> Packed:
        """The adapter in ``folder`` as pages of ``size`` numbers hold it; raises as `read` does.

        A plain one whose file is laid out as one before it is read by that one's route.
        """
        folder = home(Path(folder))
        if (quick := self._quick(folder, size, dtype)) is not None:
            return quick
        found = self.read(folder)
        layout = Layout.of(found.pieces, self.trunk.groups)
        if found.names is not None:
            self._learn(folder, found, layout)
        numbers = layout.pack(found.pieces, size, dtype)
        return Packed(layout, numbers.unbind(0), found.form, found.rank, found.error)

    def read(self, folder: str | Path) -> Found:
        """The adapter in ``folder``; raises UserError when it is damaged, of another base or of no foldable form."""
        folder, self._looked = home(Path(folder)), False
        try:
            plain = self._plain(folder)
            if plain is not None:
                form, layers = plain
                return Found(self._pieces(folder, layers), form, names=_names(layers, len(self.trunk.blocks)))
            self._looked = True
            return self._lowered(folder)
        finally:
            if self._looked:  # at the base's own weights, which need not stay in memory
                self.trunk.give_back()

    # -- routes

    def _quick(self, folder: Path, size: int, dtype: torch.dtype) -> Packed | None:
        files = adapter_files(folder)
        if not self._routes or files is None or not files[1].is_file():
            return None
        with open(files[1], "rb", buffering=0) as file:
            head = header(file)
            route = None if head is None else self._routes.get((head, _meaning(files[0])))
            if route is None:
                return None
            numbers = self._scratch.take(route.length)
            try:
                if payload(file, route.length, numbers):
                    return route.pack(numbers[: route.length], size, dtype, files[1], self._scratch)
            finally:
                self._scratch.give(numbers)
        return None

    def _learn(self, folder: Path, found: Found, layout: Layout) -> None:
        about, tensors = adapter_files(folder)
        with open(tensors, "rb", buffering=0) as file:
            head = header(file)
        route = None if head is None else Route.of(head, layout, found.form, found.rank, found.names)
        if route is not None:
            self._routes[head, _meaning(about)] = route
        while len(self._routes) > ROUTES:
            self._routes.popitem(last=False)

    # -- plain pairs

    def _plain(self, folder: Path) -> tuple[str, dict[Inner, Loose]] | None:
        if (folder / CONFIG).is_file():
            return self._peft(folder)
        if (folder / RECIPE).is_file():
            return self._ours(folder)
        from veneer.io.native import contents

        contents(folder)  # says what is wrong with it
        raise UserError(f"{folder} holds no adapter")

    def _peft(self, folder: Path) -> tuple[str, dict[Inner, Loose]] | None:
        config = read_config(folder / CONFIG)
        odd = config.saved or config.raw.get("bias", "none") not in ("none", None) or config.raw.get("lora_bias")
        if config.method.name not in PLAIN_FORMS or config.start not in PLAIN_STARTS or odd:
            return None
        layers: dict[Inner, Loose] = {}
        tensors = _tensors(folder / PEFT)
        by_layer: dict[str, dict[str, Tensor]] = {}
        keys: dict[tuple[str, str], str] = {}
        for key, tensor in tensors.items():
            bare = key.removeprefix(PREFIX)
            end = next((e for e in _ENDINGS if bare.endswith("." + e)), None)
            if end is None:
                return None
            path, factor = bare[: -len(end) - 1], _ENDINGS[end]
            by_layer.setdefault(path, {})[factor] = tensor
            keys[path, factor] = key
        for path, own in by_layer.items():
            inner = self._inner(path, folder)
            layers[inner] = self._factors(own, config, path, folder)
            if len(own) == 2:
                layers[inner].names = Names(keys[path, "A"], keys[path, "B"], config.scale(path))
        if not layers:
            raise UserError(f"{folder / PEFT} holds no factors; the file is empty or incomplete")
        return config.method.name, layers

    def _factors(self, own: Mapping[str, Tensor], config: Config, path: str, folder: Path) -> Loose:
        if "A" not in own or "B" not in own:
            raise UserError(f"{folder / PEFT} has no {'lora_A' if 'A' not in own else 'lora_B'} for {path}")
        if own["A"].ndim != 2 or own["A"].shape[0] != config.rank(path):
            raise UserError(
                f"{folder / PEFT}: lora_A of {path} has shape {tuple(own['A'].shape)}, where {CONFIG} says rank "
                f"{config.rank(path)}"
            )
        if config.raw.get("use_dora") and "m" not in own:
            raise UserError(f"{folder / PEFT} has no lora_magnitude_vector for {path}, though {CONFIG} says DoRA")
        return Loose([(own["A"], own["B"], config.scale(path))], own.get("m"))

    def _ours(self, folder: Path) -> tuple[str, dict[Inner, Loose]] | None:
        from veneer.core.recipe import parse

        about = read_json(folder / RECIPE)
        recipe = parse(typed(about, "recipe", (str,), folder / RECIPE))
        delta = recipe.part("delta")
        single = not recipe.on("mixture") and not recipe.on("side") and not recipe.on("base")
        if delta is None or delta.method.name not in PLAIN_FORMS or not single or about.get("train"):
            return None
        self._check_base(about.get("base"), folder)
        tensors = _tensors(folder / OURS)
        own: dict[str, dict[str, Tensor]] = {path: {} for path in typed(about, "sites", (list,), folder / RECIPE)}
        for key, tensor in tensors.items():
            path = next((p for p in (key.rpartition(".")[0], key.rpartition(".offset.")[0]) if p in own), None)
            if path is None:
                return None
            own[path][key[len(path) + 1 :]] = tensor
        layers: dict[Inner, Loose] = {}
        for path, t in own.items():
            if t.keys() - {"A", "B", "m", "scale", "offset.A", "offset.B", "offset.scale"} or "scale" not in t:
                return None
            pairs = [(t["A"], t["B"], float(t["scale"]))]
            if "offset.A" in t:
                pairs.append((t["offset.A"], t["offset.B"], float(t["offset.scale"])))
            names = Names(f"{path}.A", f"{path}.B", f"{path}.scale") if t.keys() == {"A", "B", "scale"} else None
            layers[self._inner(path, folder)] = Loose(pairs, t.get("m"), names=names)
        return delta.method.name, layers

    def _check_base(self, made_on: object, folder: Path) -> None:
        from veneer.models.fingerprint import base_fingerprint

        if self._base is None:
            self._looked = True
            self._base = base_fingerprint(self.trunk.model)
        if made_on != self._base:
            raise UserError(f"{folder} was made on another base (its fingerprint is {str(made_on)[:8]}…)")

    def _inner(self, path: str, folder: Path) -> Inner:
        inner = self.trunk.places.get(path)
        if inner is None:
            raise UserError(
                f"{folder} changes {path}, which is not a linear layer of a block of this {self.trunk.kind} model: "
                "it cannot be served"
            )
        return inner

    # -- other forms

    @torch.no_grad()
    def _lowered(self, folder: Path) -> Found:
        from veneer.api import load
        from veneer.io.plain import plain_factors

        with self._attached:
            adapter = load(self.trunk.model, folder, name="served")
            form = str(adapter.recipe)
            try:
                try:
                    plain = not adapter.trained and all(d.site.name is None for d in adapter.deltas.values())
                    factors = plain_factors(adapter, "a served adapter") if plain else None
                except UserError:
                    factors = None
                if factors is not None:
                    layers = {
                        self._inner(f.path, folder): Loose(
                            [(f.A, f.B, f.scale)],
                            None,
                            f.extras["lora_B.bias"] * f.scale if "lora_B.bias" in f.extras else None,
                        )
                        for f in factors
                    }
                    return Found(self._pieces(folder, layers), form)
                layers, error = self._cut(adapter, folder)
            finally:
                adapter.remove()
        if error > self.tolerance:
            raise UserError(
                f"{folder} ({form}) is no low-rank change: at rank {self.rank} an error of {error:.0%} of it is left, "
                f"more than the {self.tolerance:.0%} that is accepted; fold it into a model of its own"
            )
        return Found(self._pieces(folder, layers), form, error)

    def _cut(self, adapter, folder: Path) -> tuple[dict[Inner, Loose], float]:
        from veneer.numerics.svd import truncated_svd
        from veneer.parts.folding import folded_weights

        layers: dict[Inner, Loose] = {}
        whole = lost = 0.0
        for site, W, b in folded_weights(adapter):
            path = site.path if site.name is None else site.module_path
            loose = layers.setdefault(self._inner(path, folder), Loose())
            if site.name == "bias":
                loose.bias = W if site.weight() is None else W - site.weight().float()
                continue
            own = site.weight().detach().float()
            change = (W - own).T if site.name is not None and site.transposed else W - own
            U, S, Vh = truncated_svd(change, self.rank)
            keep = max(1, int((1e-6 * S[0].clamp_min(1e-30) < S).sum()))
            U, S, Vh = U[:, :keep], S[:keep], Vh[:keep]
            total = float(change.square().sum())
            whole, lost = whole + total, lost + max(0.0, total - float(S.square().sum()))
            loose.pairs.append((Vh * S.sqrt()[:, None], U * S.sqrt(), 1.0))
            if b is not None:
                old = site.bias()
                loose.bias = b if old is None else b - old.float()
        error = (lost / whole) ** 0.5 if whole else 0.0
        return layers, error if error > 1e-3 else 0.0

    # -- pieces

    @torch.no_grad()
    def _pieces(self, folder: Path, layers: Mapping[Inner, Loose]) -> dict[Place, Piece]:
        by_place: dict[Place, dict[int, Loose]] = {}
        for inner, loose in layers.items():
            by_place.setdefault(Place(*inner[1:]), {})[inner.layer] = loose
        return {place: self._piece(folder, place, found) for place, found in by_place.items()}

    def _piece(self, folder: Path, place: Place, found: Mapping[int, Loose]) -> Piece:
        """One row range in all layers; zeros where a layer is left alone."""
        count, rows = len(self.trunk.blocks), place.stop - place.start
        inputs = self.trunk.groups.sizes[place.group][0]
        shapes = {(A.shape[0], A.shape[-1], B.shape[0]) for x in found.values() for A, B, _ in x.pairs}
        bad = next((s for s in shapes if s[1:] != (inputs, rows)), None)
        if bad is not None:
            raise UserError(
                f"{folder}: factors of {place.group} fit a layer of {bad[2]}×{bad[1]}, and this model's is "
                f"{rows}×{inputs}: the adapter was made for another model"
            )
        ranks = {n: sum(A.shape[0] for A, _, _ in x.pairs) for n, x in found.items()}
        if len(found) == count and len(set(ranks.values())) == 1 and all(len(x.pairs) == 1 for x in found.values()):
            ordered = [found[n].pairs[0] for n in range(count)]
            A, B = (torch.stack([pair[i] for pair in ordered]) for i in (0, 1))
            scales = {pair[2] for pair in ordered}
            if scales != {1.0}:
                B = B.float() * torch.tensor([pair[2] for pair in ordered])[:, None, None]
        else:
            A, B = (
                torch.zeros(count, max([1, *ranks.values()]), inputs),
                torch.zeros(count, rows, max([1, *ranks.values()])),
            )
            for n, x in found.items():
                at = 0
                for a, b, scale in x.pairs:
                    A[n, at : at + a.shape[0]], B[n, :, at : at + a.shape[0]] = a, b.float() * scale
                    at += a.shape[0]
        piece = Piece(A, B)
        if any(x.bias is not None for x in found.values()):
            piece.bias = torch.zeros(count, rows)
            for n, x in found.items():
                if x.bias is not None:
                    piece.bias[n] = x.bias
        if any(x.magnitude is not None for x in found.values()):
            self._weigh(piece, place, found)
        if not (finite(piece.A) and finite(piece.B)):
            raise UserError(f"{folder} holds numbers that are not finite; train it again or fetch the file again")
        return piece

    def _weigh(self, piece: Piece, place: Place, found: Mapping[int, Loose]) -> None:
        """Put DoRA's gains m/‖W + BA‖ on the piece."""
        A, B, self._looked = piece.A.float(), piece.B.float(), True
        gain = torch.ones(len(self.trunk.blocks), place.stop - place.start)
        piece.bias = torch.zeros_like(gain) if piece.bias is None else piece.bias
        for n, x in found.items():
            linear = self.trunk.blocks[n].linears[place.group]
            W = linear.rows(place.start, place.stop)
            inner = Inner(n, *place)
            if inner not in self._squares:
                self._squares[inner] = row_squares(W)
            norms = row_norms(self._squares[inner], W, A[n], B[n], 1.0)
            gain[n] = x.magnitude.float().flatten() / norms.clamp_min(torch.finfo(torch.float32).tiny)
            if linear.bias is not None:
                piece.bias[n] -= (gain[n] - 1) * linear.bias[place.start : place.stop].float()
        piece.B, piece.gain = B * gain[:, :, None], gain
        piece.bias = piece.bias if bool(piece.bias.any()) else None


def _names(layers: Mapping[Inner, Loose], count: int) -> dict[Place, dict[int, Names]] | None:
    """The tensors' names by row range and layer; None unless every layer has a single pair of one rank in each."""
    found: dict[Place, dict[int, Names]] = {}
    for inner, loose in layers.items():
        if loose.names is None:
            return None
        found.setdefault(Place(*inner[1:]), {})[inner.layer] = loose.names
    return found if all(len(own) == count for own in found.values()) else None


def _meaning(about: Path) -> Hashable:
    """What of an adapter's description decides what its tensors mean."""
    content = about.read_bytes()
    if about.name == CONFIG:
        return content
    fields = json.loads(content)
    return json.dumps([fields.get(name) for name in ("recipe", "base", "sites", "train")])


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a mapped safetensors file; raises UserError when it is missing or damaged."""
    from veneer.io.files import read_tensors

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError):
        read_tensors(path)  # says what is wrong
        raise


def home(folder: Path) -> Path:
    """Where the adapter of ``folder`` lies: there, or in a run's folder under ``adapter``."""
    own = folder / ADAPTER
    return own if (folder / RUN).is_file() and own.is_dir() and not own.is_symlink() else folder


def adapter_files(folder: Path) -> tuple[Path, Path] | None:
    """(description, tensors) of an adapter in ``folder``, ours or PEFT's; None when it holds neither."""
    folder = home(folder)
    for about, tensors in ((CONFIG, PEFT), (RECIPE, OURS)):
        if (folder / about).is_file():
            return folder / about, folder / tensors
    return None


def stamp(folder: Path) -> tuple | None:
    """What changes when an adapter is replaced: size and time of its files; None while there is none."""
    files = adapter_files(folder)
    try:
        return None if files is None else tuple((s.st_mtime_ns, s.st_size, s.st_ino) for s in (f.stat() for f in files))
    except OSError:
        return None


def folders(root: Path) -> Iterable[Path]:
    """The folders right under ``root`` that hold an adapter or are a run's, by name."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        if path.is_dir() and not path.name.startswith(".") and adapter_files(path) is not None:
            found.append(path)
    return sorted(found)


def rank_of(folder: Path) -> int | None:
    """The rank that an adapter's description gives, without reading its tensors; None where it gives none."""
    try:
        about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return int(about["r"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
