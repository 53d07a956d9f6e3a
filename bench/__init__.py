"""Speed and memory, measured against peers in one run.

``python -m bench`` runs all benches, ``python -m bench.job`` one of them; figures go to ``bench/results/NAME.json``.
"""
