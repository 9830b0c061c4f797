"""Training through the ecosystem: gradient checkpointing, Trainer, LoRA."""

import copy

import pytest
import torch
from helpers import key, tiny_model, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from infmoe.checkpoint import resolve_checkpoint, results_folder
from infmoe.hf import InfMoEForCausalLM
from infmoe.layers import Routing
from infmoe.train.optim import param_groups

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("with_key", [True, False])
@pytest.mark.parametrize("ffn", ["dense", "switch", "moe", "infinity"])
def test_gradient_checkpointing_changes_no_gradient(ffn, with_key, use_reentrant):
    model, ids = tiny_model(ffn, resid_pdrop=0.1).train(), tokens(2, 9)
    given = Routing(key=key(2)) if with_key else None
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(3)
        model.zero_grad()
        out = model(ids, labels=ids, routing=given)
        out.loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert model.is_activation_checkpointing
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-7)
        assert gradient.abs().sum() > 0, name


def test_training_draws_anew_at_every_call():
    model, ids = tiny_model().train(), tokens(2, 9)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    given = Routing(key=key(2))
    assert torch.equal(model(ids, routing=given).logits, model(ids, routing=given).logits)


def test_a_step_of_training_lowers_the_loss_on_its_batch():
    model, ids = tiny_model().train(), tokens(4, 16)
    given = Routing(key=key(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids, routing=given).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("ffn", ["moe", "infinity"])
def test_the_trainer_trains_and_evaluates(ffn, tmp_path):
    model = tiny_model(ffn)
    before = copy.deepcopy(model.state_dict())
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 9)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        activation_checkpointing=True,
        learning_rate=1e-2,
        use_cpu=True,
        save_strategy="steps",
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    assert trainer.train().global_step == 3
    checkpoint = tmp_path / "checkpoint-2"
    assert resolve_checkpoint(checkpoint) == results_folder(checkpoint) == checkpoint  # no run of ours, not sealed
    assert not torch.equal(
        model.transformer.h[0].mlp.state_dict()["w2.weight" if ffn == "infinity" else "experts.w2_EFD"],
        before["transformer.h.0.mlp." + ("w2.weight" if ffn == "infinity" else "experts.w2_EFD")],
    )
    predictions = trainer.predict(rows)
    assert predictions.predictions.shape == (8, 9, 61)
    trainer.save_model(tmp_path / "out")
    ids = tokens(2, 9)
    loaded = InfMoEForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_the_trainer_takes_groups_in_which_w_z_learns_at_its_own_rate(factor, tmp_path):
    model = tiny_model(wz_lr_factor=factor)
    before = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        tmp_path, max_steps=2, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True
    )
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.1))
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 9)]
    Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert same == ({f"transformer.h.{i}.mlp.w_z.weight" for i in range(2)} if factor == 0 else set())


def test_lora_on_the_matrices_of_the_layer(tmp_path):
    base, ids = tiny_model(), tokens(2, 9)
    untouched = copy.deepcopy(base)
    model = get_peft_model(
        base,
        LoraConfig(r=4, target_modules=["w1", "w2", "w_z"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 3 * 2  # A and B, three matrices, two layers
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.train()
    model(input_ids=ids, labels=ids, routing=Routing(key=key(2))).loss.backward()
    optimizer.step()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert not torch.equal(p, before[name]), name
    model.eval()
    expected = model(input_ids=ids, num_samples=3).logits
    assert not torch.allclose(expected, untouched(ids, num_samples=3).logits, atol=1e-2)
    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "adapter").eval()
    torch.testing.assert_close(reloaded(input_ids=ids, num_samples=3).logits, expected, **CLOSE)
    merged = reloaded.merge_and_unload()
    assert type(merged) is InfMoEForCausalLM
    torch.testing.assert_close(merged(ids, num_samples=3).logits, expected, **CLOSE)
    merged.save_pretrained(tmp_path / "merged")
    again = InfMoEForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(again(ids, num_samples=3).logits, merged(ids, num_samples=3).logits)
    generated = model.generate(input_ids=ids, num_samples=3, do_sample=False, max_new_tokens=4)
    assert torch.equal(generated, merged.generate(ids, num_samples=3, do_sample=False, max_new_tokens=4))
