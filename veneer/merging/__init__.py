"""How several adapters become one.

The registry walks this folder; nothing is re-exported.
"""
