"""Muon: the step that orthogonalises matrices between two sweeps.

The first sweep updates the momentum and writes the direction of each matrix into a scratch buffer.
Matrix products orthogonalise the directions in place. The second sweep reads them as gradients of
SGD. Only the modules of this package know that the two sweeps belong together.
"""
