"""Training frameworks with onepass in the place of torch's optimizers, on a CPU.

``make test-frameworks`` runs these in an environment of their own: the frameworks are large, and
each asks for versions of its own. ``make test`` does not.
"""
