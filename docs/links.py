"""Links of Markdown files, for readers outside the repository: the site and package indexes.

As a hook of MkDocs (mkdocs.yml) it copies README.md, CONTRIBUTING.md and CHANGELOG.md into pages
and points links to files outside docs/ at the repository. As a program it prepares a copy of the
checkout for a release:

    python docs/links.py COPY https://github.com/owner/name

adds that address to COPY/pyproject.toml and makes the links and pictures of COPY/README.md
absolute. Without an address the links become plain text and the pictures are left out.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COPIED = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Page of the site -> the file of the repository that it shows."""
PAGES = {f: f"docs/{page}" for page, f in COPIED.items()}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
FENCE = re.compile(r"^(```.*?^```)", re.M | re.S)


def _replace(markdown: str, new: Any) -> str:
    """Replaces each link outside code blocks by new(mark, text, target); mark is ! of a picture."""
    parts = FENCE.split(markdown)
    for i in range(0, len(parts), 2):
        parts[i] = LINK.sub(lambda m: new(m[1], m[2], m[3]), parts[i])
    return "".join(parts)


def in_repository(markdown: str, folder: str, address: str, keep_docs: str | None = None) -> str:
    """Points relative links at the files of the repository on its host.

    Args:
        markdown: the text.
        folder: the folder of its file, relative to the repository.
        address: the address of the repository; if empty, links become text and pictures vanish.
        keep_docs: a folder of the site; links to files of docs/ become relative to it.
    """

    def new(mark: str, text: str, target: str) -> str:
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:") or not path:
            return f"{mark}[{text}]({target})"
        where = posixpath.normpath(posixpath.join(folder, path))
        end = f"#{anchor}" if anchor else ""
        page = PAGES.get(where, where)
        if keep_docs is not None and page.startswith("docs/") and not (ROOT / page).is_dir():
            return f"{mark}[{text}]({posixpath.relpath(page[5:], keep_docs or '.')}{end})"
        if not address:
            return "" if mark else text
        kind = "raw" if mark else "tree" if (ROOT / where).is_dir() else "blob"
        return f"{mark}[{text}]({address}/{kind}/main/{where}{end})"

    return _replace(markdown, new)


def web_address(remote: str) -> str:
    """The https address of a git remote, empty if it has none (a path, for example)."""
    found = re.sub(r"^(?:ssh://)?git@([^:/]+)[:/]", r"https://\1/", remote).removesuffix(".git")
    return found.rstrip("/") if found.startswith(("https://", "http://")) else ""


def on_config(config: Any) -> Any:
    """MkDocs calls this once."""
    config["repo_url"] = web_address(config["repo_url"] or "")
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """MkDocs calls this for each page."""
    uri = page.file.src_uri
    folder = posixpath.dirname(f"docs/{uri}")
    if uri in COPIED:
        markdown, folder = (ROOT / COPIED[uri]).read_text(encoding="utf-8"), ""
    return in_repository(markdown, folder, config["repo_url"], posixpath.dirname(uri))


def prepare_release(copy: Path, address: str) -> None:
    """Writes the address into the metadata and the README of a copy of the checkout."""
    address = web_address(address)
    readme = copy / "README.md"
    text = in_repository(readme.read_text(encoding="utf-8"), "", address)
    readme.write_text(text, encoding="utf-8")
    if not address:
        return
    urls = {
        "Repository": address,
        "Documentation": f"{address}/tree/main/docs",
        "Issues": f"{address}/issues",
        "Changelog": f"{address}/blob/main/CHANGELOG.md",
    }
    lines = ["", "[project.urls]", *(f'{name} = "{url}"' for name, url in urls.items())]
    with (copy / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    prepare_release(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
