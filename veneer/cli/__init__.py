"""The command line, one file a command; ``veneer.cli.main:run`` is the entry point.

Heavy packages are imported inside the commands, so that help and mistakes answer at once.
"""
