"""Tests that `make test` leaves out because they take long, and `make test-all` runs."""

from __future__ import annotations

import os

import pytest

THOROUGH = os.environ.get("ONEPASS_THOROUGH") == "1"
"""Whether to run every test, and tests of random or combined inputs with all of their inputs."""

thorough = pytest.mark.skipif(not THOROUGH, reason="takes long: make test-all runs it")
