"""The kernel ladder: what each step of the fastest kernel's making gained, kept to be run.

``python -m bench.ladder`` times the rungs of each ladder in turns. A rung differs from the one
before it in one thing. Its code is here where the product has none of the kind.
"""
