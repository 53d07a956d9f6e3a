"""Adapters on disk: Veneer's own format, PEFT directories, GGUF LoRA files, merged models.

Formats are known here, methods are not: a method's file carries its own map.
"""
