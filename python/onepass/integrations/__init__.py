"""Integration with other optimizer libraries."""
