"""Claims: one script a method that tries what its paper says, against LoRA at equal effort, and writes what it found.

``harness`` is the manual; ``tasks`` and ``texts`` hold the protocols; ``verdicts`` the rules.
"""
