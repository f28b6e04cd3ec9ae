"""The benchmark: how long a step takes, beside other libraries and beside a copy.

``python -m bench`` measures and appends to bench/results, ``python -m bench.report`` writes
docs/performance.md and its picture from what is there.
"""
