"""Training text that every machine has: the source code of Python's standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from onepass_tools import UsageError

# Tests, third-party packages, and files that are mostly data: code pages and help texts.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
SKIPPED |= {"encodings", "pydoc_data"}


@dataclass(frozen=True)
class Corpus:
    """Training and validation text as uint8 vectors; no file is in both parts."""

    train: Tensor
    validation: Tensor
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]


def load(max_bytes: int, validation_share: float = 0.1) -> Corpus:
    """Read at most `max_bytes` of the standard library, split by file.

    Raises UsageError if the standard library has too little readable source code.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(
        path
        for path in root.rglob("*.py")
        if not SKIPPED.intersection(path.relative_to(root).parts) and path.is_file()
    )
    names = {path.relative_to(root).as_posix(): path for path in paths}

    parts: dict[str, list[bytes]] = {"train": [], "validation": []}
    files: dict[str, list[str]] = {"train": [], "validation": []}
    validation_bytes = int(validation_share * max_bytes)
    room = {"validation": validation_bytes, "train": max_bytes - validation_bytes}
    # The order by hash mixes the packages and is the same on every machine. Only the name of a file
    # determines its part, so additional files in another Python version do not move other files.
    for digest, name in sorted((hashlib.sha256(n.encode()).digest(), n) for n in names):
        part = "validation" if digest[-1] < 256 * validation_share else "train"
        try:
            text = names[name].read_bytes()
        except OSError:
            continue
        # Skip large files: one of them could fill most of the validation text.
        if not text or len(text) > min(room[part], max_bytes // 16):
            continue
        room[part] -= len(text)
        parts[part].append(text)
        files[part].append(name)

    corpus = Corpus(
        train=_bytes(parts["train"]),
        validation=_bytes(parts["validation"]),
        train_files=tuple(files["train"]),
        validation_files=tuple(files["validation"]),
    )
    if min(corpus.train.numel(), corpus.validation.numel()) < 10_000:
        smallest = min(corpus.train.numel(), corpus.validation.numel())
        raise UsageError(
            f"{root} must contain at least 10,000 bytes of Python source each for training and for "
            f"validation; got {smallest:,} bytes"
        )
    return corpus


def _bytes(texts: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(texts) or b"\0"), dtype=torch.uint8)


class Batches:
    """Random windows of a text; batch `i` depends only on the text, the seed and `i`."""

    def __init__(self, text: Tensor, count: int, batch: int, context: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        last = text.numel() - context - 1
        starts = torch.randint(last + 1, (count, batch), generator=generator)
        self._text = text
        self._starts = starts.to(text.device)
        self._window = torch.arange(context + 1, device=text.device)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, int64 (batch, context); targets are shifted by one byte."""
        window = self._text[self._starts[index][:, None] + self._window].long()
        return window[:, :-1], window[:, 1:]
