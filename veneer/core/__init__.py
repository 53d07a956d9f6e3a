"""The core: sites, deltas, attaching, evidence, hooks, recipes and the registry.

It imports no method; methods import it.
"""
