"""Starts of a delta's factors: one file a start.

The registry walks this folder; nothing is re-exported.
"""
