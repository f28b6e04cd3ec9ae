"""`onepass memory --mesh` compared with models that transformers divides among two ranks."""

import os

import pytest
import torch
import torch.distributed as dist
import transformers
from transformers.distributed import DistributedConfig

import onepass
from onepass.memory.models.from_transformers import of_transformers
from onepass.memory.predict import storage_bytes
from onepass.memory.scenarios import Terms, candidate, predicted
from onepass.memory.shards import Mesh
from tests import zero_ranks
from tests.zero_model import everywhere

COMMON = {
    "vocab_size": 302,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 352,
}
EXPERTS = {"moe_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
TP, EP = {"tp_plan": "auto"}, {"ep_size": 2, "fsdp_size": 2}
CASES = {
    "llama": (transformers.LlamaConfig(**COMMON), TP, Mesh(tp=2)),
    "qwen3": (transformers.Qwen3Config(**COMMON, head_dim=32), TP, Mesh(tp=2)),
    "experts": (transformers.Qwen3MoeConfig(**COMMON, **EXPERTS), EP, Mesh(fsdp=2, ep=2)),
}


def _local(tensor):
    return getattr(tensor, "_local_tensor", tensor)


def bytes_are_as_predicted(directory, saved):
    # transformers divides a model only with the variables that torchrun sets.
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    for name, (config, options, mesh) in CASES.items():
        divided = transformers.AutoModelForCausalLM.from_pretrained(
            saved / name, distributed_config=DistributedConfig(**options)
        )
        optimizer = onepass.AdamW(divided.parameters(), states="mx8")
        tokens = torch.arange(16).reshape(2, 8)
        divided(input_ids=tokens, labels=tokens).loss.backward()
        gradients = storage_bytes(_local(p.grad) for p in divided.parameters())
        optimizer.step()
        states = [_local(v) for state in optimizer.state.values() for v in state.values()]
        model = of_transformers(config.to_dict(), name, name)
        found = predicted(candidate("adamw8bit"), model, Terms(torch.float32, mesh=mesh))
        measured = {
            # On a CPU, transformers leaves parts as views of whole tensors; a GPU gets parts only.
            "weights": sum(_local(p).nbytes for p in divided.parameters()),
            "gradients": gradients,
            "moments": storage_bytes(states),
        }
        for part, nbytes in measured.items():
            most = max(everywhere(nbytes))
            assert most == pytest.approx(getattr(found, part), rel=0.005), (name, part, most, found)


def test_ranks_hold_what_is_predicted(tmp_path):
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch has no gloo here")
    for name, (config, *_) in CASES.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(tmp_path / name)
    check = bytes_are_as_predicted
    found = zero_ranks.run(2, [check], tmp_path, saved=tmp_path)
    assert found[check.__name__] is None, found[check.__name__]
