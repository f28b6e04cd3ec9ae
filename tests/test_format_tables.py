"""The tables of formats agree with the C++ enum, the option types and the file names."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import get_args

import pytest

from onepass.formats import STATE_FORMATS, VERSION, WEIGHT_FORMATS, readable
from onepass.optim.options import States, Weights

FORMATS = {**STATE_FORMATS, **WEIGHT_FORMATS}
TABLE_H = Path(__file__).parents[1] / "csrc" / "formats" / "table.h"


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_in_the_file_of_its_name(name):
    assert importlib.import_module(f"onepass.formats.{name}").FORMAT is FORMATS[name]


def test_no_two_formats_have_one_name():
    assert len(FORMATS) == len(STATE_FORMATS) + len(WEIGHT_FORMATS)


def test_numbers_are_those_of_the_compiled_libraries():
    states = [form.code for form in STATE_FORMATS.values()]
    weights = [code for form in WEIGHT_FORMATS.values() for code in form.codes.values()]
    assert len(set(states)) == len(states)
    assert len(set(weights)) == len(weights)
    enum = re.search(r"enum class Format .*?\};", TABLE_H.read_text(), re.S)
    assert {int(number) for number in re.findall(r"= (\d+),", enum[0])} == {*states, *weights}


def test_dtypes_tell_state_formats_apart():
    dtypes = [(form.dtype, form.scale) for form in STATE_FORMATS.values()]
    assert len(set(dtypes)) == len(dtypes)


def test_option_types_list_every_format():
    assert get_args(States) == tuple(STATE_FORMATS)
    assert get_args(Weights) == tuple(WEIGHT_FORMATS)


def test_readable_versions():
    assert all(readable(VERSION, name) for name in STATE_FORMATS)
    assert not any(readable(VERSION + 1, name) or readable(0, name) for name in STATE_FORMATS)
    assert [name for name in STATE_FORMATS if not readable(1, name)] == ["mx4"]
