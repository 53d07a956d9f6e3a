"""Training: the loop, its loss, precision, checkpoints, the proof at the end, the bridge to other trainers.

``fit`` runs all of it; heavy packages are imported when a run starts.
"""
