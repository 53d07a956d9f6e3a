"""Tensors that torch's fully_shard has spread over the processes: whole for a file, spread again from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.core.adapter import Adapter


def sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if sharded(tensor) else tensor


def gathered(tree: Any) -> Any:
    """A nested state with every sharded tensor whole. All processes must call it."""
    if isinstance(tree, Tensor):
        return tree.full_tensor() if sharded(tree) else tree
    if isinstance(tree, dict):
        return {key: gathered(value) for key, value in tree.items()}
    return type(tree)(gathered(value) for value in tree) if type(tree) in (list, tuple) else tree


def spread(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in the form of ``like``: on its device, and sharded as it is where the shapes agree."""
    if not sharded(like) or value.shape != like.shape:
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def load_state(adapter: Adapter, values: dict[str, Tensor]) -> None:
    """``adapter.load_state`` of whole tensors, sharded or not."""
    own = adapter.state()
    adapter.load_state({k: spread(v, own[k]) if k in own and sharded(own[k]) else v for k, v in values.items()})


class Whole:
    """An adapter as its file wants it, every tensor whole; all processes make it, one saves it."""

    def __init__(self, adapter: Adapter) -> None:
        self._state, self._description = gathered(adapter.state()), adapter.description()

    def state(self) -> dict[str, Tensor]:
        """The adapter's state, whole."""
        return self._state

    def description(self) -> dict[str, Any]:
        """The adapter's description."""
        return self._description

    def save(self, directory: Path) -> None:
        """Write it in Veneer's own format."""
        from veneer.io.native import save

        save(self, directory)
