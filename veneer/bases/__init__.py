"""How the frozen weight is stored and run: one file a storage.

The registry walks this folder; nothing is re-exported.
"""
