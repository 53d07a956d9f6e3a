"""Side networks that learn beside the base without a backward pass through it.

The registry walks this folder; nothing is re-exported.
"""
