"""Hashes of kernel sources, and the commit of a copy without a git repository."""

from __future__ import annotations

import json
import shutil

import pytest

from bench import results, sources

C = """// A comment.
#define TWICE(x) \\
  ((x) + (x))
#include "a.h"
inline int f(int a, const char* s = "// no comment") {  // another
  return a /* inside */ + TWICE(a) - 'x';
}
"""
C_TOO = """#define TWICE(x) ((x)+(x))
#include "a.h"
inline int f(int a,
             const char *s = "// no comment")
{ return a + TWICE( a ) - 'x'; }
"""
PYTHON = '''"""Documentation."""
import os  # why


def f(a, b=(1, 2,)):
    """More."""

    return [
        a,
        b,
        "# no comment",
    ]
'''
PYTHON_TOO = """import os
def f(a, b=(1, 2)):
  return [a, b, "# no comment"]
"""


def of(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return sources.essence(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "one", "same"),
    [("a.h", C, C_TOO), ("a.py", PYTHON, PYTHON_TOO)],
    ids=["C++", "Python"],
)
def test_comments_and_formatting_do_not_count(name, one, same, tmp_path):
    assert of(tmp_path, name, one) == of(tmp_path, name, same)
    for old, new in [("no comment", "another"), ("return", "return -"), ("f(", "g(")]:
        assert of(tmp_path, name, one.replace(old, new)) != of(tmp_path, name, one)


def test_words_stay_apart_and_directives_stay_lines(tmp_path):
    assert of(tmp_path, "a.h", "unsigned int x;") != of(tmp_path, "a.h", "unsignedint x;")
    assert of(tmp_path, "a.h", "#define A\nB") != of(tmp_path, "a.h", "#define A B")
    assert of(tmp_path, "a.py", "if a:\n  b\nc") != of(tmp_path, "a.py", "if a:\n  b\n  c")


def test_every_backend_has_sources():
    found = sources.kernel_hashes()
    assert found.keys() == {"cpu", "cuda", "triton"}
    assert len(set(found.values())) == 3


def test_a_copy_without_git_knows_its_commit_and_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    monkeypatch.setattr(sources, "ORIGIN", tmp_path / "origin.json")
    monkeypatch.setattr(sources, "_git", lambda *_: None)
    (tmp_path / "a.py").write_text("1")
    assert sources.commit_and_dirty() == (None, None)
    origin = {"commit": "abc", "dirty": False, "files": sources._file_hashes(["a.py"])}
    (tmp_path / "origin.json").write_text(json.dumps(origin))
    assert sources.commit_and_dirty() == ("abc", False)
    (tmp_path / "a.py").write_text("2")
    assert sources.commit_and_dirty() == ("abc", True)
    (tmp_path / "a.py").unlink()
    assert sources.commit_and_dirty() == ("abc", True)
    with pytest.raises(RuntimeError, match="is not a git repository"):
        sources.write_origin(tmp_path / "build" / "origin.json")


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git here")
def test_the_origin_of_this_checkout(tmp_path):
    if sources.commit_and_dirty()[0] is None:
        pytest.skip("this is no git repository")
    sources.write_origin(tmp_path / "origin.json")
    origin = json.loads((tmp_path / "origin.json").read_text())
    assert "bench/sources.py" in origin["files"]
    assert results.environment()["commit"] == origin["commit"]
