"""How much capacity goes where, and when: one file a method.

The registry walks this folder; nothing is re-exported.
"""
