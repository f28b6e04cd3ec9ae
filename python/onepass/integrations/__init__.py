"""Training frameworks, and other optimizer libraries."""
