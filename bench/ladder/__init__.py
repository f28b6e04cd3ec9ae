"""The kernel ladder: how much each optimization of the fastest kernel gains.

``python -m bench.ladder`` times the rungs of each ladder, interleaved. A rung is a version of the
step that differs from the rung before it in one optimization. This package holds the versions that
onepass itself does not contain.
"""
