"""What the specification has beside rules and formats: random bits, norms, verdicts."""
