"""The rest of the NumPy specification: random bits, gradient norms, and clip-or-skip verdicts."""
