"""The benchmark: the time of an optimizer step, compared with other libraries and with a copy.

``python -m bench`` measures and appends result lines to bench/results. ``python -m bench.report``
writes docs/performance.md and its pictures from these lines.
"""
