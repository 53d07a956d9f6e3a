"""How a gradient becomes a step: one file a method.

The registry walks this folder; nothing is re-exported.
"""
