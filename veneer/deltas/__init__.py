"""Forms of the change of a weight: one file a form.

The registry walks this folder; nothing is re-exported.
"""
