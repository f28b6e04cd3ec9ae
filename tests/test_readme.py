"""README.md and docs: code blocks run, links and anchors resolve, tables are up to date."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from onepass.__main__ import main

from .support.scripts import run_script

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
GENERATED = ("algorithms/", "comparison/")  # see tests/test_algorithm_docs.py and onepass compare
# Definitions that the code blocks of a page expect from the reader's program.
SETUP = {
    "step.md": """
model = torch.nn.Linear(4, 4)
optimizer = onepass.AdamW(model.parameters(), ema_decay=0.9)
compute_loss = evaluate = lambda model: model(torch.randn(2, 4)).square().mean()
compute_loss(model).backward()
optimizer.step()
optimizer.zero_grad()
""",
    "trainer.md": """
import tempfile
from pathlib import Path
from torch import nn
path = Path(tempfile.mkdtemp()) / "run.pt"
model = nn.Linear(4, 4)
labels = torch.arange(64) % 4
dataset = torch.utils.data.TensorDataset(torch.randn(64, 4), labels)
""",
    "own-rule.md": "model = torch.nn.Linear(4, 4)",
    "paging.md": "model = torch.nn.Linear(64, 64)",
    "formats.md": "model = torch.nn.Linear(64, 64, dtype=torch.bfloat16)",
    "zero.md": """
import os, tempfile
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
store = torch.distributed.FileStore(tempfile.mktemp(), 1)
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
model = torch.nn.Linear(64, 64)
""",
    "checkpoints.md": """
import tempfile
path = tempfile.mktemp()
model = torch.nn.Linear(64, 64)
params = list(model.parameters())
optimizer = onepass.AdamW(params)
model(torch.randn(2, 64)).square().mean().backward()
optimizer.step()
class bnb_optimizer:
    load_state_dict = staticmethod(lambda state: None)
    @staticmethod
    def state_dict():
        made = onepass.AdamW(params, states="dynamic8")
        made.load_state_dict(optimizer.state_dict())
        return onepass.to_bitsandbytes(made)
""",
}
SLOW = {"bench", "compare", "demo"}


def blocks(page, language):
    return [code for name, code in FENCE.findall(page.read_text()) if name == language]


README_BLOCKS = blocks(README, "python")
FRAMEWORK_BLOCKS = blocks(ROOT / "docs" / "frameworks.md", "python")


def run(code, folder):
    path = folder / "block.py"  # a file, because triton.jit reads the source of a function
    path.write_text(code)
    result = run_script(path, folder, threads=2)
    assert result.returncode == 0, result.stderr
    return result


def needed(code):
    """The packages that a code block imports and that are not installed."""
    names = re.findall(r"^(?:from|import) (\w+)", code, re.M)
    if "timm" in names:
        names.append("torchvision")  # timm imports torchvision
    return sorted({name for name in names if find_spec(name) is None})


@pytest.mark.parametrize("code", README_BLOCKS, ids=range(len(README_BLOCKS)))
def test_a_block_of_the_readme_runs_by_itself(code, tmp_path):
    result = run(code, tmp_path)
    if "print(" in code:
        loss = float(re.search(r"^loss (\d+\.\d+)\n\Z", result.stdout, re.M).group(1))
        assert loss < 1.0
    assert not result.stderr


@pytest.mark.parametrize("code", FRAMEWORK_BLOCKS, ids=range(len(FRAMEWORK_BLOCKS)))
def test_a_block_of_the_frameworks_runs_by_itself(code, tmp_path):
    if missing := needed(code):
        pytest.skip(f"{', '.join(missing)} not installed: make test-frameworks has them")
    assert re.search(r"^loss \d+\.\d+$", run(code, tmp_path).stdout, re.M)


ONE_AFTER_ANOTHER = [
    page
    for page in DOCS
    if page.name != "frameworks.md"
    and not str(page.relative_to(ROOT / "docs")).startswith(GENERATED)
    and blocks(page, "python")
]


@pytest.mark.parametrize("page", ONE_AFTER_ANOTHER, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path):
    if page.name == "weight-sync.md":
        pytest.importorskip("safetensors")
    start = "import torch, onepass\n" + SETUP.get(page.name, "")
    run("\n".join([start, *blocks(page, "python")]), tmp_path)


def test_blocks_are_marked_with_their_language():
    for page in PAGES:
        for language, code in FENCE.findall(page.read_text()):
            assert language or not re.search(r"^(import|from|optimizer =)", code, re.M), (
                f"{page.name}: a block of Python without a language:\n{code}"
            )


def commands():
    """The onepass commands in the shell blocks of every page."""
    for page in PAGES:
        for language, code in FENCE.findall(page.read_text()):
            if language in ("", "bash"):
                for line in code.replace("\\\n", "").splitlines():
                    command = line.split("#")[0].split(">")[0].strip()
                    if command.startswith("onepass "):
                        yield command


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_a_command_is_accepted(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = command.split()[1:]
    if words[0] in SLOW or "my_package" in command or "--measure" in command:
        words = [words[0], "--help"]  # tests/test_memory_cli.py checks the options
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    assert code in (0, 1, None), capsys.readouterr().err


@cache
def anchors(page):
    """The anchors of the headings of a page, as GitHub and MkDocs generate them."""
    text = FENCE.sub("", page.read_text())
    found = set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        found.add(re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_lead_somewhere(page):
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor and target.suffix == ".md" and "api.md" not in str(target):
            assert anchor in anchors(target), f"{page.name}: {link}"


def load_links():
    spec = spec_from_file_location("links", ROOT / "docs" / "links.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_of_a_release_are_absolute_or_text(tmp_path):
    links = load_links()
    for name in ("README.md", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    links.prepare_release(tmp_path, "git@example.com:owner/name.git")
    found = LINK.findall(FENCE.sub("", (tmp_path / "README.md").read_text()))
    assert found
    assert all(link.startswith(("https://", "#")) for link in found)
    assert "https://example.com/owner/name/raw/main/docs/demo.png" in found
    metadata = (tmp_path / "pyproject.toml").read_text()
    assert 'Issues = "https://example.com/owner/name/issues"' in metadata

    (tmp_path / "README.md").write_text("![a](docs/demo.png) [text](docs/step.md) [b](#c)")
    links.prepare_release(tmp_path, "/a/path")  # a remote without a web address
    assert (tmp_path / "README.md").read_text() == " text [b](#c)"


def test_links_of_the_site_lead_to_pages_or_to_the_repository():
    links = load_links()
    text = "[a](docs/step.md#x) [b](CONTRIBUTING.md) [c](python/onepass) [d](csrc/plan.h)"
    assert links.in_repository(text, "", "https://h/r", "") == (
        "[a](step.md#x) [b](contributing.md) "
        "[c](https://h/r/tree/main/python/onepass) [d](https://h/r/blob/main/csrc/plan.h)"
    )
    assert links.in_repository("[a](../../csrc/plan.h)", "docs/algorithms", "", "algorithms") == "a"


def test_every_page_is_in_the_navigation_of_the_site():
    config = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"([\w/-]+\.md)$", config, re.M))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in DOCS}


def test_tables_are_those_of_the_result_lines():
    from bench import readme

    for path in readme.PAGES:
        text = path.read_text()
        marks = re.findall(r"<!-- table: (\w+) -->", text)
        assert marks, path.name
        assert readme.page(text) == text, f"{path.name} is stale: run python -m bench.readme"


def test_the_readme_has_no_figure_beside_the_tables():
    """The prose of the README contains no times or bytes, because they change with the results."""
    text = re.sub(r"<!-- table.*?<!-- end", "", FENCE.sub("", README.read_text()), flags=re.S)
    assert re.findall(r"\d+(?:\.\d+)? (?:ms|GB/s|bytes per parameter)\b", text) == []


def test_ci_runs_the_command_that_the_readme_names():
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert command in README.read_text()
