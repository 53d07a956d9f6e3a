"""Who holds the data and in what order it comes.

The registry walks this folder; nothing is re-exported.
"""
