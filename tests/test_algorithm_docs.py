"""The pages in docs/algorithms show the code of the rule and the bytes of its states.

`python -m tests.test_algorithm_docs` rewrites both parts of every page.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import onepass
from onepass.formats import STATE_FORMATS
from onepass.rules import RULES

DOCS = Path(__file__).parents[1] / "docs" / "algorithms"
PAGES = {name: DOCS / f"{name}.md" for name in RULES}


def code(name):
    return f"```python\n{inspect.getsource(RULES[name].update)}```"


def memory(name):
    """A table of the states of a rule: the flag of each, and bytes per value by format."""
    rule = RULES[name]
    rows = [
        f"| `{slot.key}` | {slot.flag or 'always'} | "
        + " | ".join(
            f"{rule.format_of(slot.key, form).bytes:.4g}" for form in STATE_FORMATS.values()
        )
        + " |"
        for slot in rule.slots
    ]
    heads = " | ".join(f"`{form}`" for form in STATE_FORMATS)
    return "\n".join(
        [f"| state | with | {heads} |", "|---|---|" + "---:|" * len(STATE_FORMATS), *rows]
    )


def filled(name, text):
    for mark, content in (("rule", code(name)), ("memory", memory(name))):
        text, count = re.subn(
            rf"(<!-- {mark} -->\n).*?(\n<!-- end -->)",
            lambda m, content=content: m.group(1) + content + m.group(2),
            text,
            flags=re.S,
        )
        assert count == 1, f"{name}: {mark}"
    return text


@pytest.mark.parametrize("name", RULES)
def test_a_page_has_the_rule_and_its_memory(name):
    text = PAGES[name].read_text()
    assert filled(name, text) == text


@pytest.mark.parametrize("name", RULES)
def test_a_page_has_the_required_headings(name):
    text = PAGES[name].read_text()
    for heading in (
        "## The rule",
        "## Memory",
        "## Beside torch.optim",
        "## Source",
        *(["## Its path"] if (DOCS.parent / "comparison" / f"path-{name}.png").exists() else []),
    ):
        assert f"\n{heading}\n" in text, heading
    source = Path(onepass.__file__).parents[2] / "csrc" / "rules" / f"{name}.h"
    assert source.exists()
    assert f"../../csrc/rules/{name}.h" in text


if __name__ == "__main__":
    for page, path in PAGES.items():
        path.write_text(filled(page, path.read_text()))
