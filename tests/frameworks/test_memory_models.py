"""`onepass memory` builds models from configurations of transformers.

The expected numbers of parameters are those that the model cards on huggingface.co state ("Model
size"), where tied tensors count once.
"""

import json

import pytest

from onepass.memory.models import KNOWN, find
from onepass.memory.models.published import known
from onepass.memory.shards import local, parse_mesh

# owner/name -> (the part of config.json that determines the count, number of parameters)
MODELS = {
    "openai-community/gpt2": (
        {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_positions": 1024,
            "vocab_size": 50257,
        },
        124_439_808,
    ),
    "google-bert/bert-base-uncased": (
        {
            "model_type": "bert",
            "architectures": ["BertModel"],
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "vocab_size": 30522,
        },
        109_482_240,
    ),
    "google-t5/t5-small": (
        {
            "model_type": "t5",
            "architectures": ["T5ForConditionalGeneration"],
            "d_model": 512,
            "d_ff": 2048,
            "d_kv": 64,
            "num_layers": 6,
            "num_heads": 8,
            "vocab_size": 32128,
        },
        60_506_624,
    ),
    "openai/whisper-tiny": (
        {
            "model_type": "whisper",
            "architectures": ["WhisperForConditionalGeneration"],
            "d_model": 384,
            "encoder_layers": 4,
            "decoder_layers": 4,
            "encoder_attention_heads": 6,
            "decoder_attention_heads": 6,
            "encoder_ffn_dim": 1536,
            "decoder_ffn_dim": 1536,
            "vocab_size": 51865,
        },
        37_760_640,
    ),
    "state-spaces/mamba-130m-hf": (
        {
            "model_type": "mamba",
            "architectures": ["MambaForCausalLM"],
            "hidden_size": 768,
            "intermediate_size": 1536,
            "num_hidden_layers": 24,
            "state_size": 16,
            "vocab_size": 50280,
        },
        129_135_360,
    ),
    "microsoft/Phi-3-mini-4k-instruct": (
        {
            "model_type": "phi3",
            "architectures": ["Phi3ForCausalLM"],
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32064,
        },
        3_821_079_552,
    ),
    "meta-llama/Llama-2-7b-hf": (
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32000,
        },
        6_738_415_616,
    ),
    "meta-llama/Meta-Llama-3-8B": (
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
        8_030_261_248,
    ),
    "mistralai/Mistral-7B-v0.1": (
        {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
        },
        7_241_732_096,
    ),
    "mistralai/Mixtral-8x7B-v0.1": (
        {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "vocab_size": 32000,
        },
        46_702_792_704,
    ),
    "Qwen/Qwen2.5-0.5B": (
        {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        494_032_768,
    ),
    "Qwen/Qwen2-7B": (
        {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
        },
        7_615_616_512,
    ),
    "Qwen/Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151936,
            "tie_word_embeddings": False,
        },
        30_532_122_624,
    ),
    "deepseek-ai/DeepSeek-V3": (
        {
            "model_type": "deepseek_v3",
            "architectures": ["DeepseekV3ForCausalLM"],
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "first_k_dense_replace": 3,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "vocab_size": 129280,
            "num_nextn_predict_layers": 1,
        },
        671_026_404_352,
    ),
    "openai/gpt-oss-20b": (
        {
            "model_type": "gpt_oss",
            "architectures": ["GptOssForCausalLM"],
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "vocab_size": 201088,
        },
        20_914_757_184,
    ),
    "google/gemma-3-4b-it": (
        {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 34,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "vocab_size": 262208,
            },
            "vision_config": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "patch_size": 14,
                "vision_use_head": False,
                "image_size": 896,
            },
        },
        4_300_079_472,
    ),
    "facebook/opt-125m": (
        {
            "model_type": "opt",
            "architectures": ["OPTForCausalLM"],
            "hidden_size": 768,
            "ffn_dim": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 2048,
            "vocab_size": 50272,
            "word_embed_proj_dim": 768,
        },
        125_239_296,
    ),
    "EleutherAI/pythia-160m": (
        {
            "model_type": "gpt_neox",
            "architectures": ["GPTNeoXForCausalLM"],
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "vocab_size": 50304,
            "tie_word_embeddings": False,
        },
        162_322_944,
    ),
    "FacebookAI/roberta-base": (
        {
            "model_type": "roberta",
            "architectures": ["RobertaForMaskedLM"],
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "vocab_size": 50265,
        },
        124_697_433,
    ),
    "google/vit-base-patch16-224": (
        {
            "model_type": "vit",
            "architectures": ["ViTForImageClassification"],
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 16,
            "num_labels": 1000,
        },
        86_567_656,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_as_many_as_published(name, tmp_path):
    config, published = MODELS[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert find(str(path)).numel == published


def test_without_an_architecture_the_model_is_that_of_the_first_task(tmp_path):
    config = {k: v for k, v in MODELS["openai-community/gpt2"][0].items() if k != "architectures"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find(str(tmp_path)).numel == known("gpt2").numel == KNOWN["gpt2"].parameters


LLAMA = MODELS["meta-llama/Llama-2-7b-hf"][0]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "lama"}, "has no model_type 'lama'; did you mean .*'llama'"),
        ({**LLAMA, "num_hidden_layers": -1}, "num_hidden_layers must be an integer >= 1; got -1"),
        ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers must be an integer >= 1; got 0"),
        ({**LLAMA, "hidden_size": -64}, "hidden_size must be an integer >= 1; got -64"),
        ({**LLAMA, "vocab_size": 0}, "vocab_size must be an integer >= 1; got 0"),
        ({**LLAMA, "intermediate_size": -1}, "intermediate_size must be an integer >= 0; got -1"),
        ({**LLAMA, "num_attention_heads": 0}, "not a valid configuration of llama: transformers"),
        ({**LLAMA, "hidden_size": "8"}, "not a valid configuration of llama: transformers"),
        ({**LLAMA, "num_key_value_heads": -8}, "num_key_value_heads must be an integer >= 0"),
    ],
)
def test_bad_configurations_are_errors(config, says, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=says):
        find(str(path))


def test_the_plans_of_a_configuration_divide_its_parameters(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODELS["mistralai/Mixtral-8x7B-v0.1"][0]))
    model = find(str(tmp_path))
    whole = {s.name: s.shape for s in model.shapes}
    two = {s.name: s.shape for s in local(model, parse_mesh("tp=2"))[1]}
    experts = "model.layers.31.mlp.experts.gate_up_proj"
    for name, dim in (
        ("model.layers.31.self_attn.k_proj.weight", 0),
        ("model.layers.31.self_attn.o_proj.weight", 1),
        ("model.embed_tokens.weight", 0),
        ("lm_head.weight", 0),
        (experts, 1),
    ):
        halved = list(whole[name])
        halved[dim] //= 2
        assert two[name] == tuple(halved), name
    assert two["model.norm.weight"] == whole["model.norm.weight"]
    four = {s.name: s.shape for s in local(model, parse_mesh("fsdp=8,ep=4"))[1]}
    assert four[experts] == (1, *whole[experts][1:])
