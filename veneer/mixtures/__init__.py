"""How several adapters act at once: one file a mixture.

The registry walks this folder; nothing is re-exported.
"""
