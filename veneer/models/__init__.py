"""Models: loading them (hub, folder, GGUF, package), and what their names and configs say about their parts.

Nothing here knows of adapters. Transformers is imported only when a model is loaded.
"""

from veneer.models.architecture import (
    attention_modules,
    block_index,
    blocks,
    embedding,
    fused_rows,
    head,
    head_dim,
    heads,
    mlp_modules,
    role,
    tied,
    trunk,
)
from veneer.models.load import load_model
from veneer.models.precision import fast_bf16, precision

__all__ = [
    "attention_modules",
    "block_index",
    "blocks",
    "embedding",
    "fast_bf16",
    "fused_rows",
    "head",
    "head_dim",
    "heads",
    "load_model",
    "mlp_modules",
    "precision",
    "role",
    "tied",
    "trunk",
]
