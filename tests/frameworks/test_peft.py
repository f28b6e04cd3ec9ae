"""peft: LoRA over a frozen base in 8 and 4 bits; the optimizer receives all parameters."""

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import LlamaConfig, LlamaForCausalLM

import onepass

from . import parts


class Int8Linear(torch.nn.Linear):
    """A frozen linear layer whose weight is stored in 8 bits."""

    def __init__(self, of):
        super().__init__(of.in_features, of.out_features, bias=False)
        self.scale = float(of.weight.detach().abs().max()) / 127
        codes = (of.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(codes, requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def in_4_bits(layer):
    made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False)
    made.weight = bnb.nn.Params4bit(layer.weight.detach(), requires_grad=False)
    return made.to("cpu")


def base(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(part, name, kind(child))
    return model


@pytest.mark.parametrize("kind", [Int8Linear, in_4_bits])
@pytest.mark.parametrize(("cls", "options"), parts.BUILT)
def test_lora_over_a_frozen_base(cls, options, kind):
    model = prepare_model_for_kbit_training(base(kind), use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} & {torch.int8, torch.uint8}
    kept = [p.detach().clone() for p in frozen]
    optimizer = cls(model.parameters(), lr=0.05, **options)
    tokens = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert parts.same(kept, frozen)
    trained = {p for p in model.parameters() if p.requires_grad}
    assert set(optimizer.state) == trained
    other = cls(model.parameters(), lr=0.05, **options)
    other.load_state_dict(optimizer.state_dict())
    assert set(other.state) == trained


def test_parameter_groups_take_the_frozen_ones():
    model = base(Int8Linear)
    groups = onepass.parameter_groups(model)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    onepass.AdamW(groups)
