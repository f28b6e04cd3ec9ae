"""Checks that all ranks run: the memory of a training step is as `onepass memory --mesh` predicts.

The model has one token per batch, so that its activations are negligible.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import onepass
from onepass.memory.models import of_module
from onepass.memory.predict import storage_bytes
from onepass.memory.probes import _allocations
from onepass.memory.report import TOLERANCE
from onepass.memory.scenarios import Terms, candidate, predicted
from onepass.memory.shards import parse_mesh

from .zero_model import everywhere, mesh


class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = torch.nn.Linear(width, 4 * width)
        self.down = torch.nn.Linear(4 * width, width)
        self.register_buffer("table", torch.zeros(64, width))

    def forward(self, hidden):
        return hidden + self.down(torch.relu(self.up(hidden))) + self.table[0]


class Model(torch.nn.Module):
    """Four equal blocks between an embedding and a head with 301 rows, uneven on 2 to 4 ranks."""

    def __init__(self, width=130, blocks=4, vocabulary=301):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, width)
        self.layers = torch.nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = torch.nn.Linear(width, vocabulary)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden).clone()


def _meshes(world):
    if world == 1:
        return [""]
    return [f"fsdp={world}", f"zero2={world}", *(["dp=2,fsdp=2"] if world == 4 else [])]


def _peak(step):
    """The most bytes that a step has allocated and not freed at a time."""
    live = peak = 0
    for nbytes in _allocations(step):
        live += nbytes
        peak = max(peak, live)
    return peak


def the_peak_of_a_step_is_as_predicted(directory, checkpoints):
    world = dist.get_world_size()
    for text in _meshes(world):
        over = parse_mesh(text)
        for name, dtype, make in (
            ("adamw+mx8+split8", torch.bfloat16, {"states": "mx8", "weights": "split8"}),
            ("adamw", torch.float32, {}),
        ):
            torch.manual_seed(0)
            model = Model().to(dtype)
            expected = predicted(
                candidate(name), of_module(model, "model"), Terms(dtype, mesh=over)
            )
            if world > 1:
                shape, names = ((2, 2), ("dp", "fsdp")) if over.dp > 1 else ((world,), None)
                devices = mesh(*shape, names=names)
                reshard = over.stage == 3
                for part in (*model.layers, model):
                    fully_shard(part, mesh=devices, reshard_after_forward=reshard)
            optimizer = onepass.AdamW(model.parameters(), **make)
            tokens = torch.zeros(1, 1, dtype=torch.long)

            def step(model=model, optimizer=optimizer, tokens=tokens):
                model(tokens).float().sum().backward()
                optimizer.step()
                optimizer.zero_grad()

            step()
            step()
            local = [getattr(p, "_local_tensor", p) for p in model.parameters()]
            states = [v for state in optimizer.state.values() for v in state.values()]
            states = storage_bytes(getattr(v, "_local_tensor", v) for v in states)
            weights = storage_bytes(local) + storage_bytes(model.buffers())
            most = max(everywhere(states))
            assert abs(most / (expected.moments + expected.companions) - 1) <= TOLERANCE, text
            # gloo frees buffers in threads of its own, on a busy machine later than the next
            # allocations. The prediction is of a step in which they are freed in time.
            errors = []
            while len(errors) < 20 and not any(abs(error) <= 0.02 for error in errors):
                measured = max(everywhere(weights + states + _peak(step)))
                errors.append(measured / expected.peak - 1)
            assert min(map(abs, errors)) <= 0.02, (text, name, expected, errors)


EVERYWHERE = [the_peak_of_a_step_is_as_predicted]
