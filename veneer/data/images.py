"""One image out of whatever a row holds, and its pixels as the model wants them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from veneer.data.read import kind_of
from veneer.errors import UserError


def open_image(value: Any, where: str) -> Any:
    """A PIL image in RGB.

    Args:
        value: a path, the bytes of a file, a datasets cell ``{"bytes", "path"}``, a PIL image, or an array (H, W),
            (H, W, 3), (H, W, 4) or (3, H, W) of bytes (0 to 255).
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise UserError("images need Pillow, which is not installed: pip install 'veneer[images]'") from error
    if isinstance(value, dict) and (value.get("bytes") or value.get("path")):
        value = value.get("bytes") or value["path"]
    try:
        if isinstance(value, str | Path):
            return Image.open(value).convert("RGB")
        if isinstance(value, bytes):
            return Image.open(io.BytesIO(value)).convert("RGB")
        if isinstance(value, Image.Image):
            return value.convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f'{where}: there is no image file "{value}"') from error
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        named = f' "{value}"' if isinstance(value, str | Path) else ""
        raise UserError(f"{where}: the image{named} is broken or of an unknown kind ({error})") from error
    if not isinstance(value, np.ndarray | torch.Tensor):
        raise UserError(f"{where}: the image is {kind_of(value)}; expected a path, an image or an array of bytes")
    array = np.asarray(value)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] not in (3, 4):
        array = array.transpose(1, 2, 0)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise UserError(
            f"{where}: the image is an array {array.shape} of {array.dtype}; expected (H, W) or (H, W, 3) of uint8"
        )
    return Image.fromarray(array).convert("RGB")


def pixels(image: Any, processor: Any) -> torch.Tensor:
    """(C, H, W) float32 of a PIL image: by a transformers image processor, or any function of an image."""
    if hasattr(processor, "preprocess") or hasattr(processor, "image_processor"):
        return processor(images=image, return_tensors="pt")["pixel_values"][0].float()
    values = processor(image)
    if not isinstance(values, torch.Tensor) or values.ndim != 3:
        raise UserError(f"the image processor returned {kind_of(values)}; expected a tensor (channels, height, width)")
    return values.float()


def content(value: Any, where: str) -> bytes:
    """Bytes that change when the image does, for fingerprints."""
    if isinstance(value, str | Path):
        return Path(value).read_bytes()
    image = open_image(value, where)
    return repr(image.size).encode() + image.tobytes()
