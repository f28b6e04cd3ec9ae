"""Rule definitions: their limits, and libraries that were built for other rules."""

from dataclasses import replace

import pytest

from onepass.engine import libraries
from onepass.rules import LAYOUT, RULES, limits
from onepass.rules.base import Flag, ScalarState, Slot

ADAM = RULES["adam"]


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("flags", {"flags": tuple(Flag(f"flag{i}") for i in range(limits.MAX_FLAGS + 1))}),
        (
            "states",
            {"slots": tuple(Slot(f"s{i}", "first") for i in range(limits.MAX_STATES + 1))},
        ),
        (
            "scalar states",
            {
                "scalar_states": tuple(
                    ScalarState(f"s{i}", 0.0) for i in range(limits.MAX_SCALAR_STATES + 1)
                )
            },
        ),
        ("scalars", {"scalars": limits.MAX_SCALARS + 1}),
    ],
)
def test_a_rule_over_a_limit_is_refused(what, change):
    with pytest.raises(ValueError, match=rf"rule 'adam' has \d+ {what}; at most \d+ are allowed"):
        replace(ADAM, **change)


def test_a_rule_with_too_many_options_of_its_own_is_refused():
    rule = replace(ADAM, own=lambda group: (0.0,) * (limits.MAX_OPTIONS + 1))
    with pytest.raises(ValueError, match=f"at most {limits.MAX_OPTIONS} are allowed"):
        rule.options_row({"lr": 0.1, "weight_decay": 0.0})
    full = replace(ADAM, own=lambda group: (7.0,) * limits.MAX_OPTIONS)
    options = full.options_row({"lr": 0.1, "weight_decay": 0.0})
    assert options.count(7.0) == limits.MAX_OPTIONS


@pytest.mark.skipif(bool(libraries.missing), reason=libraries.missing or "built")
def test_a_library_built_for_other_rules_is_refused(monkeypatch):
    monkeypatch.setattr(libraries, "LAYOUT", LAYOUT + " adan")
    message = libraries._load()
    assert libraries.LIBRARY.name in message
    assert LAYOUT in message
    assert "adan" in message
    assert "build it again" in message
