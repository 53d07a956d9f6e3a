"""Pieces that several methods share: components, banks, sparse entries.

They build on the core and know no method.
"""
