"""A network of this folder on disk: its kind and sizes as JSON, its weights as safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from veneer.errors import UserError
from veneer.models.networks.naf import NAFNet
from veneer.models.networks.span import SPAN

KINDS: dict[str, type[nn.Module]] = {"span": SPAN, "nafnet": NAFNet}
CONFIG, WEIGHTS = "network.json", "network.safetensors"


def save(network: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write a network into ``folder``, the description last; returns the folder. Adapters on it are left out."""
    kind = next((name for name, cls in KINDS.items() if isinstance(network, cls)), None)
    if kind is None:
        raise UserError(f"{type(network).__name__} is not one of the networks kept here: {', '.join(KINDS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    save_file({name: t.contiguous() for name, t in network.state_dict().items()}, folder / f"{WEIGHTS}.part")
    os.replace(folder / f"{WEIGHTS}.part", folder / WEIGHTS)
    text = json.dumps({"network": kind, **network.sizes}, indent=2) + "\n"
    (folder / f"{CONFIG}.part").write_text(text, encoding="utf-8")
    os.replace(folder / f"{CONFIG}.part", folder / CONFIG)
    return folder


def load(folder: str | os.PathLike[str]) -> nn.Module:
    """The network in ``folder``, in eval mode; raises UserError naming the file that is missing or does not fit."""
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}: give the folder of a network that was saved whole")
    try:
        sizes = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        network = KINDS[sizes.pop("network")](**sizes)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG} does not describe a network ({error}); save it again") from None
    try:
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder / WEIGHTS} is not what {CONFIG} beside it describes ({reason})") from None
    return network.eval()
