"""Models as lists of shapes: parameter counts, configurations, factories and shards."""

from __future__ import annotations

import json

import pytest
import torch

from onepass.memory.models import (
    FAMILIES,
    KNOWN,
    Model,
    Shape,
    find,
    from_transformers,
    known,
    of_module,
)
from onepass.memory.models.shapes import BIAS, CONV, EMBEDDING, MATRIX, NORM
from onepass.memory.scenarios import Terms, candidate, predicted
from onepass.memory.shards import Mesh, local, parse_mesh, sharded
from onepass.memory.sizes import parse_size, show


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_as_many_as_published(name):
    model = known(name)
    assert model.numel == model.published == KNOWN[name].parameters
    assert model.source.startswith("https://")
    assert len({shape.name for shape in model.shapes}) == len(model.shapes)
    assert {shape.kind for shape in model.shapes} <= {EMBEDDING, NORM, MATRIX, CONV, BIAS}


def test_the_table_has_the_families_that_people_ask_for():
    families = {row.family for row in KNOWN.values()}
    assert families >= {"gpt2", "llama", "mistral", "qwen2", "gemma", "vit", "resnet", "bert"}
    assert {"llama-2-7b", "llama-3-8b", "resnet-50"} <= KNOWN.keys()


def test_shapes_of_a_layer():
    shapes = {s.name: s.shape for s in known("llama-3-8b").shapes}
    assert shapes["model.layers.31.self_attn.k_proj.weight"] == (1024, 4096)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (4096, 14336)
    assert known("resnet-50").convolutional
    assert not known("vit-b-16").convolutional


CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


def test_a_configuration_on_disk_without_transformers(tmp_path, monkeypatch):
    without = "transformers is not installed"
    monkeypatch.setattr(from_transformers, "missing", lambda: without)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    expected = 2 * 100 * 64 + 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64)
    assert find(str(path)).numel == find(str(tmp_path)).numel == expected
    path.write_text(json.dumps({**CONFIG, "tie_word_embeddings": True}))
    assert find(str(path)).numel == expected - 100 * 64


def test_a_name_in_the_hubs_cache(tmp_path, monkeypatch):
    folder = tmp_path / "models--some--model" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert find("some/model").numel > 0
    with pytest.raises(ValueError, match="no model 'some/other'"):
        find("some/other")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ("[]", "no model_type"),
        ('{"hidden_size": 3}', "has no model_type"),
        ('{"model_type": "lama"}', "needs transformers .* did you mean 'llama'"),
        ('{"model_type": "llama", "hidden_size": 8}', "needs 'intermediate_size'"),
        (json.dumps({**CONFIG, "hidden_size": "8"}), "not a valid configuration of llama"),
        (json.dumps({**CONFIG, "hidden_size": -64}), "integers > 0"),
        (json.dumps({**CONFIG, "num_attention_heads": 0}), "not a valid configuration of llama"),
    ],
)
def test_invalid_configurations_are_refused(content, says, tmp_path, monkeypatch):
    without = "transformers is not installed"
    monkeypatch.setattr(from_transformers, "missing", lambda: without)
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=says):
        find(str(path))


def test_factories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_model_for_memory.py").write_text(
        "import torch\n"
        "def big():\n"
        "    return torch.nn.Sequential(torch.nn.Embedding(10**6, 10**5), torch.nn.LayerNorm(8))\n"
        "def none():\n"
        "    return 3\n"
        "def broken():\n"
        "    raise RuntimeError('not today')\n"
    )
    model = find("my_model_for_memory:big")  # would be 400 GB if it were not on the meta device
    assert model.numel == 10**11 + 16
    assert [s.kind for s in model.shapes] == [EMBEDDING, NORM, NORM]
    for name, says in {
        "my_model_for_memory:none": "must return a torch.nn.Module; got a int",
        "my_model_for_memory:broken": "RuntimeError: not today",
        "my_model_for_memory:bigg": "did you mean 'big'",
        "my_model_for_memorx:big": "cannot be imported",
        "my_model_for_memory:torch": "must be callable; got a module",
    }.items():
        with pytest.raises(ValueError, match=says):
            find(name)


def test_a_shared_parameter_counts_once():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert of_module(model, "tied").numel == 9 + 3 + 3


def test_near_names():
    with pytest.raises(ValueError, match="did you mean 'llama-3-8b'"):
        find("llama3-8b")
    with pytest.raises(ValueError, match=r"did you mean .*adamw"):
        candidate("adamww")
    with pytest.raises(ValueError, match="did you mean 'mx8'"):
        candidate("adamw+mx88")
    with pytest.raises(ValueError, match="Lion has no amsgrad"):
        candidate("lion+amsgrad")


def test_every_class_of_the_library_has_a_name():
    for name in ("adamw", "lion8bit", "pagedadamw8bit", "adamw+mx4+split8+ema", "sgd+nesterov"):
        model = known("bert-base")
        assert predicted(candidate(name), model, Terms()).peak > 2 * 2 * model.numel


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("1.5 GiB", 3 << 29),
        ("100", 100),
        ("512mib", 1 << 29),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["24GX", "", "GB", "-1GB", "0", "1e9", "24 GB left", "nan"])
def test_invalid_sizes_are_refused(text):
    with pytest.raises(ValueError, match="a size must be a number with B, KB"):
        parse_size(text)


def test_shown_sizes_have_three_digits():
    shown = [show(n) for n in (0, 999, 1000, 1234, 9_994_999, 9_996_000, 99_960_000, 10**12)]
    assert shown == [
        "0 B",
        "999 B",
        "1.00 kB",
        "1.23 kB",
        "9.99 MB",
        "10.0 MB",
        "100 MB",
        "1.00 TB",
    ]


def test_fsdp2_cuts_rows_and_zero1_the_states():
    model, count = known("gpt2"), 8
    shapes = {s.name: s.shape for s in sharded(model.shapes, count)}
    assert shapes["wte.weight"] == (-(-50257 // count), 768)
    whole = predicted(candidate("adamw"), model, Terms())
    fsdp = predicted(candidate("adamw"), model, Terms(mesh=parse_mesh({"fsdp": count})))
    zero = predicted(candidate("adamw"), model, Terms(mesh=parse_mesh({"zero1": count})))
    for part in ("weights", "gradients", "moments"):
        assert getattr(fsdp, part) == pytest.approx(getattr(whole, part) / count, rel=0.001)
    assert (zero.weights, zero.gradients) == (whole.weights, whole.gradients)
    # zero1 assigns whole parameters: the rank of the embedding has only that, more than 1/8.
    assert zero.moments == pytest.approx(2 * 4 * 50257 * 768, rel=0.001)


def test_fsdp2_cuts_as_torch_does():
    """The shard of the first rank is the first part of torch.chunk."""
    for rows in (1, 7, 8, 9, 50257):
        for count in (1, 2, 3, 8, 16):
            shape = sharded([known("gpt2").shapes[0].__class__("w", (rows, 4), MATRIX)], count)[0]
            chunk = torch.empty(rows, 4, device="meta").chunk(count)[0]
            assert shape.shape == tuple(chunk.shape)


PLAN = {
    "model.embed": "embedding_rowwise",
    "model.layers.*.q_proj": "colwise",
    "model.layers.*.o_proj": "rowwise",
    "model.layers.*.experts.gate_up_proj": "packed_colwise",
}
PLANNED = Model(
    "planned",
    (
        Shape("model.embed.weight", (101, 8), EMBEDDING),
        Shape("model.layers.11.q_proj.weight", (20, 8), MATRIX),
        Shape("model.layers.11.q_proj.bias", (20,), BIAS),
        Shape("model.layers.11.o_proj.weight", (8, 20), MATRIX),
        Shape("model.layers.11.o_proj.bias", (8,), BIAS),
        Shape("model.layers.11.experts.gate_up_proj", (6, 32, 8), MATRIX),
        Shape("model.norm.weight", (8,), NORM),
    ),
    tp_plan=PLAN,
    ep_plan={"model.layers.*.experts.gate_up_proj": "grouped_gemm"},
)


def test_tensor_and_expert_parallelism_follow_the_plan():
    def cut(text):
        whole, part = local(PLANNED, parse_mesh(text))
        return [s.shape for s in whole], [s.shape for s in part]

    tp = [(51, 8), (10, 8), (10,), (8, 10), (8,), (6, 16, 8), (8,)]
    assert cut("tp=2") == (tp, tp)
    # FSDP2 cuts the first dimension of what tensor parallelism left.
    assert cut("fsdp=4,tp=2") == (
        tp,
        [(13, 8), (3, 8), (3,), (2, 10), (2,), (2, 16, 8), (2,)],
    )
    # The experts are cut over ep ranks and then over fsdp / ep ranks; everything else over fsdp.
    whole, part = cut("fsdp=4,ep=2")
    assert (whole[5], part[5]) == ((3, 32, 8), (2, 32, 8))
    assert (whole[0], part[0]) == ((101, 8), (26, 8))
    # Replicas do not change the bytes of a rank, except those of experts.
    assert cut("dp=4")[1] == [s.shape for s in PLANNED.shapes]
    assert cut("dp=4,ep=2")[1][5] == (3, 32, 8)


def test_the_gradient_of_a_divided_embedding_is_whole():
    terms = Terms(torch.bfloat16, mesh=Mesh(tp=2))
    found = predicted(candidate("adamw"), PLANNED, terms)
    assert found.gradients == found.weights + (101 - 51) * 8 * 2


def test_meshes():
    assert parse_mesh("zero3=8, tp=2") == parse_mesh({"fsdp": 8, "tp": 2}) == Mesh(fsdp=8, tp=2)
    assert parse_mesh("zero2=4").stage == 2
    assert (str(parse_mesh("dp=2,zero1=4")), parse_mesh("dp=2,fsdp=4,tp=2").ranks) == (
        "dp=2,zero1=4",
        16,
    )
    assert parse_mesh(None) == parse_mesh("") == Mesh()
    for text, says in (("pp=2", "'pp' is unknown"), ("fsdp", "fsdp must be a whole number")):
        with pytest.raises(ValueError, match=says):
            parse_mesh(text)


def test_gathered_modules_are_counted_once_they_exceed_the_step():
    model, terms = known("gpt2"), Terms(mesh=Mesh(fsdp=8))
    found = predicted(candidate("adamw"), model, terms)
    block = 2 * sum(s.numel for s in model.shapes if s.name.startswith("h.3."))
    root = 2 * model.numel - 12 * block
    gradients = 2 * model.numel / 8
    # At the end of the backward pass: the root's weights and gradients, the shards of the blocks'
    # gradients, and the input of the last reduce-scatter.
    peak = 2 * root + 12 * block / 8 + block
    assert found.gathered == pytest.approx(peak - gradients, rel=0.001)
    # ZeRO-2 also holds all weights; ZeRO-1 gathers nothing.
    two = predicted(candidate("adamw"), model, Terms(mesh=Mesh(fsdp=8, stage=2)))
    assert two.gathered == pytest.approx(root + 14 * block - gradients, rel=0.001)
    assert predicted(candidate("adamw"), model, Terms(mesh=Mesh(fsdp=8, stage=1))).gathered == 0


def test_careful_groups_are_those_of_the_library():
    import onepass

    model = torch.nn.Sequential(
        torch.nn.Embedding(50, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 96)
    )
    shapes = of_module(model, "small")
    onepass.cast_model(model)
    groups = onepass.parameter_groups(model)
    real = onepass.memory.profile(onepass.AdamW(groups, states="mx8", weights="split8"))
    found = predicted(candidate("adamw+mx8+split8"), shapes, Terms(careful=True))
    assert found == real.predicted
    plain = predicted(candidate("adamw+mx8+split8"), shapes, Terms())
    assert plain.moments < found.moments


def test_every_family_has_a_model_in_the_table():
    assert {row.family for row in KNOWN.values()} == FAMILIES.keys()
