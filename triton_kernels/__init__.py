"""Triton kernels of onepass: rules, formats and the one sweep that puts them together.

Installed as ``onepass.triton_kernels`` and imported only when the triton backend is first used:
Triton reads TRITON_INTERPRET when a kernel is decorated.
"""
