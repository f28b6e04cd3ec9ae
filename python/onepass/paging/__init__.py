"""Paged states: optimizer states larger than the device. See docs/paging.md."""
