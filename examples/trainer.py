"""Train with transformers' own Trainer: the model is a PreTrainedModel and draws its own noise key."""

import tempfile

import torch
from transformers import Trainer, TrainingArguments

from infmoe import InfMoEConfig, InfMoEForCausalLM
from infmoe.train.optim import param_groups

torch.manual_seed(0)
config = InfMoEConfig(
    vocab_size=64,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=256,
    max_position_embeddings=32,
    z_dim=16,
    wz_lr_factor=0.5,
)
model = InfMoEForCausalLM(config)

# Sequences that count upwards from a random start: a model that learns gets this nearly right.
starts = torch.randint(0, 64, (256, 1))
sequences = (starts + torch.arange(32)) % 64
dataset = [{"input_ids": row, "labels": row} for row in sequences]

with tempfile.TemporaryDirectory() as out:
    arguments = TrainingArguments(
        out,
        max_steps=40,
        per_device_train_batch_size=16,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    # Trainer itself knows neither W_z's own learning rate and decay nor the biases of stacked experts.
    optimizer = torch.optim.AdamW(param_groups(model, lr=3e-3, weight_decay=0.1))
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, optimizers=(optimizer, None))
    first = trainer.evaluate(dataset)["eval_loss"]
    trainer.train()
    last = trainer.evaluate(dataset)["eval_loss"]
print(f"loss {first:.3f} -> {last:.3f}")
assert last < first - 1.0, "the model did not learn"
