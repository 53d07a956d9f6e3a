"""Pure functions on tensors: decompositions, solves, sketches, codebooks, norms.

Torch only, nothing of the rest of the package but its error; a generator is passed in where there is chance.
"""
