"""State dicts: saving, loading, and conversion to other formats and libraries."""
