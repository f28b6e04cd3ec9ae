"""Measuring optimizer steps: ours beside other libraries, and beside what memory allows.

A :class:`~onepass_tools.benchmark.cases.Case` is a rule, its formats and a parameter list;
:func:`~onepass_tools.benchmark.timing.run_case` checks and times every
:class:`~onepass_tools.benchmark.provider.Provider` of it on a
:class:`~onepass_tools.benchmark.devices.Device`. ``onepass bench`` is the command for one case; the
repository's ``bench/`` has tables of cases and keeps their results.
"""
