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

__all__ = [
    "attention_modules",
    "block_index",
    "blocks",
    "embedding",
    "fused_rows",
    "head",
    "head_dim",
    "heads",
    "mlp_modules",
    "role",
    "tied",
    "trunk",
]
