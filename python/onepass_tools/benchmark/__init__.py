"""Benchmark of optimizer steps: onepass, other libraries, and the memory bandwidth limit.

A :class:`~onepass_tools.benchmark.cases.Case` is a rule, its formats and a parameter list.
:func:`~onepass_tools.benchmark.timing.run_case` checks and times every
:class:`~onepass_tools.benchmark.provider.Provider` that supports the case on a
:class:`~onepass_tools.benchmark.devices.Device`. ``onepass bench`` runs one case; ``bench/`` in the
repository contains tables of cases and their results.
"""
