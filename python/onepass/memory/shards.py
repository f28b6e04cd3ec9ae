"""The part of a model that one of several GPUs holds.

Sources: torch.distributed.fsdp.fully_shard, whose shards are padded ``Shard(0)``;
torch.distributed.optim.ZeroRedundancyOptimizer, which assigns whole parameters; the plans
``base_model_tp_plan`` and ``base_model_ep_plan`` of transformers' configurations.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .models.shapes import Model, Shape

_ZERO = {"zero1": 1, "zero2": 2, "zero3": 3}
ACCEPTED = "dp, fsdp, zero1, zero2, zero3, tp and ep with sizes, as in fsdp=8,tp=2"
# The dimension of a weight that each style of a plan cuts; biases are cut by the first two only.
_CUTS = {"colwise": -2, "embedding_rowwise": 0, "rowwise": -1}


@dataclass(frozen=True)
class Mesh:
    """A device mesh, by the number of ranks of each kind of parallelism.

    Attributes:
        dp: replicas (DDP; with ``fsdp`` above 1, HSDP).
        fsdp: ranks over which parameters, or their states, are sharded.
        stage: the ZeRO stage of ``fsdp``: 1 shards states, 2 also gradients, 3 also weights.
        tp: tensor parallel ranks.
        ep: expert parallel ranks, which are a part of the ``dp`` * ``fsdp`` ranks.
    """

    dp: int = 1
    fsdp: int = 1
    stage: int = 3
    tp: int = 1
    ep: int = 1

    @property
    def ranks(self) -> int:
        """The number of GPUs."""
        return self.dp * self.fsdp * self.tp

    def __str__(self) -> str:
        name = "fsdp" if self.stage == 3 else f"zero{self.stage}"
        sizes = {"dp": self.dp, name: self.fsdp, "tp": self.tp, "ep": self.ep}
        return ",".join(f"{key}={size}" for key, size in sizes.items() if size > 1)


ONE_GPU = Mesh()


def parse_mesh(text: str | Mapping[str, int] | Mesh | None) -> Mesh:
    """The mesh of a text such as "fsdp=8,tp=2", or of a mapping with the same keys.

    "fsdp" and "zero3" are FSDP2, "zero2" is FSDP2 with ``reshard_after_forward=False``, "zero1" is
    ZeroRedundancyOptimizer, and "dp" with "fsdp" is HSDP.

    Raises:
        ValueError: a key is unknown or given twice, a size is not an integer of at least 1, or the
            expert parallel ranks do not divide the data parallel ranks.
    """
    if text is None or isinstance(text, Mesh):
        return text or ONE_GPU
    if isinstance(text, str):
        pairs = [part.partition("=")[::2] for part in text.split(",") if part.strip()]
    else:
        pairs = [(key, str(size)) for key, size in text.items()]
    found: dict[str, int] = {}
    for key, size in pairs:
        key = key.strip().lower()
        name = "fsdp" if key in _ZERO else key
        if name not in ("dp", "fsdp", "tp", "ep") or name in found:
            wrong = "is given twice" if name in found else "is unknown"
            raise ValueError(f"mesh: {key!r} {wrong}; a mesh must consist of {ACCEPTED}")
        if not size.strip().isdecimal() or int(size) < 1:
            raise ValueError(f"mesh: {key} must be a whole number of at least 1; got {size!r}")
        found[name] = int(size)
        found |= {"stage": _ZERO[key]} if key in _ZERO else {}
    mesh = Mesh(**found)
    of, name = (mesh.fsdp, "fsdp") if mesh.fsdp > 1 else (mesh.dp, "dp")
    if of % mesh.ep:
        raise ValueError(f"mesh: ep must divide {name} ({of}); got {mesh.ep}")
    return mesh


def _rows(shape: Shape, count: int, dim: int = 0) -> Shape:
    """The largest of ``count`` parts of a tensor, cut along a dimension as by torch.chunk."""
    if not shape.shape or count == 1:
        return shape
    sizes = list(shape.shape)
    sizes[dim] = -(-sizes[dim] // count)
    return replace(shape, shape=tuple(sizes))


def _style(name: str, plan: Mapping[str, str]) -> str | None:
    """The style of a plan for a parameter; a number in its name matches ``*`` in the plan."""
    generic = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
    return plan.get(generic) or plan.get(generic.rpartition(".")[0])


def tensor_parallel(model: Model, count: int) -> list[Shape]:
    """The shapes on the first of ``count`` tensor parallel ranks, by the plan of the model.

    Raises:
        ValueError: the model has no plan.
    """
    if count == 1:
        return list(model.shapes)
    if not model.tp_plan:
        raise ValueError(
            f"mesh: tp needs the plan of the model (base_model_tp_plan), and {model.name} has "
            "none: give a transformers configuration with a plan, with transformers installed"
        )
    found = []
    for shape in model.shapes:
        style = _style(shape.name, model.tp_plan) or ""
        style = style.removeprefix("packed_")
        base = next((cut for cut in _CUTS if style.startswith(cut)), None)
        vector = len(shape.shape) == 1
        if base is None or (vector and base == "rowwise"):
            found.append(shape)
        else:
            found.append(_rows(shape, count, 0 if vector else _CUTS[base]))
    return found


def undivided_gradients(model: Model, count: int) -> int:
    """The elements of gradients that a tensor parallel rank holds beyond those of its parts.

    The gradient of a divided embedding is whole on every rank: transformers makes it a replicated
    DTensor, of which the step uses the rank's part.
    """
    cut = zip(model.shapes, tensor_parallel(model, count), strict=True)
    return sum(
        whole.numel - part.numel
        for whole, part in cut
        if whole.trained and _style(whole.name, model.tp_plan) == "embedding_rowwise"
    )


def sharded(shapes: Sequence[Shape], count: int) -> list[Shape]:
    """The shapes on the first of ``count`` ranks under FSDP2.

    FSDP2 shards every parameter along its first dimension d0 into ceil(d0 / count) rows per rank,
    and pads the last ranks to this size.
    """
    return [_rows(shape, count) for shape in shapes]


def _experts(model: Model) -> set[str]:
    return {s.name for s in model.shapes if _style(s.name, model.ep_plan) == "grouped_gemm"}


def parts(model: Model, mesh: Mesh, shapes: Sequence[Shape]) -> list[int]:
    """The number of ranks over which FSDP2 shards each parameter: fsdp / ep for experts."""
    experts = _experts(model) if mesh.ep > 1 else set()
    return [max(1, mesh.fsdp // mesh.ep) if s.name in experts else mesh.fsdp for s in shapes]


def local(model: Model, mesh: Mesh) -> tuple[list[Shape], list[Shape]]:
    """(the shapes before FSDP2, those after FSDP2) on the rank that holds the most.

    Expert parallel ranks are a part of the data parallel ranks: experts are divided among ``ep``
    ranks along their first dimension, and then over the remaining fsdp / ep ranks.

    Raises:
        ValueError: the model has no plan for ``tp`` or ``ep``.
    """
    whole = tensor_parallel(model, mesh.tp)
    if mesh.ep > 1:
        experts = _experts(model)
        if not experts:
            raise ValueError(
                "mesh: ep needs a model whose transformers configuration has experts "
                f"(base_model_ep_plan), and {model.name} has none"
            )
        whole = [_rows(s, mesh.ep) if s.name in experts else s for s in whole]
    counts = parts(model, mesh, whole)
    return whole, [_rows(s, count) for s, count in zip(whole, counts, strict=True)]


def dealt(groups: Iterable[Sequence[Shape]], count: int) -> list[list[Shape]]:
    """The shapes whose states each of ``count`` ranks holds under ZeRO-1.

    The parameters of each group are assigned in descending order of size, each to the rank with the
    fewest elements so far. Ranks without parameters are left out.
    """
    ranks: list[list[Shape]] = [[] for _ in range(count)]
    sizes = [0] * count
    for group in groups:
        for shape in sorted(group, key=lambda s: -s.numel):
            rank = sizes.index(min(sizes))
            ranks[rank].append(shape)
            sizes[rank] += shape.numel
    return [rank for rank in ranks if rank]


def check(model: Model, count: int) -> str:
    """A remark if parameters have fewer rows than there are shards; empty otherwise."""
    small = [s for s in model.shapes if s.shape and s.shape[0] < count]
    if not small:
        return ""
    return (
        f"{len(small)} parameters have fewer rows than there are shards ({count}): some ranks hold "
        "nothing of them, the first a row"
    )
