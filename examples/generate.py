"""Text at several settings of the dials, from one saved model: `python examples/generate.py [DIR]`."""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM

import infmoe.hf  # noqa: F401 - registers the model with the Auto classes
from infmoe import InfMoEConfig, InfMoEForCausalLM

if len(sys.argv) > 1:
    folder = sys.argv[1]
else:  # a random model will do to show the calls
    folder = tempfile.mkdtemp()
    torch.manual_seed(0)
    config = InfMoEConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        z_dim=16,
    )
    InfMoEForCausalLM(config).save_pretrained(folder)

model = AutoModelForCausalLM.from_pretrained(folder, num_samples=1)  # a new default for this process
prompt = torch.tensor([[1, 2, 3, 4]])
for dials in ({}, {"num_samples": 4, "keep_ratio": 0.5}, {"routing_mode": "mu", "keep_ratio": 0.125}):
    torch.manual_seed(0)  # draws the tokens; the routing noise has its own seed, in the config
    tokens = model.generate(prompt, max_new_tokens=8, do_sample=True, pad_token_id=0, **dials)
    print(dials or "as loaded", tokens[0, 4:].tolist())
