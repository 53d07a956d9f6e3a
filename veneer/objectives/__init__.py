"""What is added to the loss: one file an objective.

The registry walks this folder; nothing is re-exported.
"""
