"""The formula of activations, compared with training steps of models of transformers on a CPU."""

import pytest
import torch
import transformers

import onepass
from onepass.memory import Sample, fits
from onepass.memory.predict import storage_bytes
from onepass.memory.probes import _allocations

COMMON = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
MODELS = {
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**COMMON, intermediate_size=344, num_key_value_heads=2),
    ),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(**COMMON, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0),
    ),
    "opt": (
        transformers.OPTForCausalLM,
        transformers.OPTConfig(
            **COMMON, ffn_dim=512, max_position_embeddings=256, dropout=0, word_embed_proj_dim=128
        ),
    ),
}
BATCH, TOKENS = 2, 128
# The largest error of the peak of a step; the working memory of a checkpointed block is rounded.
TOLERANCES = {False: 0.02, True: 0.05}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_the_peak_with_activations_is_as_predicted(name, attention, checkpointing):
    torch.manual_seed(0)
    made, config = MODELS[name]
    config._attn_implementation, config.use_cache = attention, False
    model = made(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = onepass.AdamW(model.parameters(), states="mx8")
    tokens = torch.randint(0, config.vocab_size, (BATCH, TOKENS))

    def step():
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    states = [v for state in optimizer.state.values() for v in state.values()]
    held = storage_bytes([*model.parameters(), *model.buffers(), *states])
    live = peak = 0
    for nbytes in _allocations(step):
        live += nbytes
        peak = max(peak, live)
    sample = Sample(BATCH, TOKENS, checkpointing, attention)
    found = fits(model, optimizer, device="1GB", sample=sample)
    error = found.peak / (held + peak) - 1
    assert abs(error) <= TOLERANCES[checkpointing], f"{error:+.2%}: {found.explain()}"
    assert found.fits
    # The configuration on its own describes the same model.
    alone = fits(config, "adamw8bit", device="1GB", sample=sample, dtype=torch.float32)
    assert alone.peak == pytest.approx(found.peak, rel=0.01)
