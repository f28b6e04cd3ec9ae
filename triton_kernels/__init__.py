"""Triton kernels of onepass: the rules, the formats and the sweep kernel that combines them.

Installed as ``onepass.triton_kernels`` and imported only when the triton backend is first used:
Triton reads TRITON_INTERPRET when a kernel is decorated.
"""
