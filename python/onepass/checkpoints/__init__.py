"""State dicts: what is saved and loaded, and conversions to other formats and libraries."""
