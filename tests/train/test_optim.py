"""Parameter groups, the learning rate, and the optimizer's state in a safetensors file."""

import itertools
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from infmoe.errors import InfMoEError
from infmoe.hf import InfMoEForCausalLM
from infmoe.train.config import OptimConfig, ScheduleConfig, hf_config
from infmoe.train.optim import build_optimizer, load_optimizer_tensors, lr_ratio, optimizer_tensors, set_lr

OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1)


def group_of(optimizer, model, name: str) -> dict:
    param = dict(model.named_parameters())[name]
    (group,) = [g for g in optimizer.param_groups if any(p is param for p in g["params"])]
    return group


def test_groups(small):
    own = ("model.wz_bias=true", "model.wz_lr_factor=3", "model.wz_weight_decay=0.5")
    model = InfMoEForCausalLM(hf_config(small(*own)))
    optimizer = build_optimizer(model, OPTIM)
    assert {group["lr"] for group in optimizer.param_groups} == {OPTIM.lr, 3 * OPTIM.lr}
    set_lr(optimizer, 1e-2)
    for name, lr, decay in (
        ("transformer.wte.weight", 1e-2, 0.1),
        ("transformer.h.0.attn.c_attn.weight", 1e-2, 0.1),
        ("transformer.h.0.attn.c_attn.bias", 1e-2, 0.0),
        ("transformer.ln_f.weight", 1e-2, 0.0),
        ("transformer.h.0.mlp.w1.weight", 1e-2, 0.1),
        ("transformer.h.1.mlp.w_z.weight", 3e-2, 0.5),
        ("transformer.h.1.mlp.w_z.bias", 3e-2, 0.0),
    ):
        group = group_of(optimizer, model, name)
        assert (group["lr"], group["weight_decay"]) == pytest.approx((lr, decay)), name
    grouped = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(grouped) == len(list(model.parameters()))


def test_biases_of_stacked_experts_do_not_decay(small):
    model = InfMoEForCausalLM(hf_config(small(variant="moe")))
    optimizer = build_optimizer(model, OPTIM)
    assert group_of(optimizer, model, "transformer.h.0.mlp.experts.w1_EDF")["weight_decay"] == 0.1
    bias = dict(model.named_parameters())["transformer.h.0.mlp.experts.b1_EF"]
    assert bias.ndim == 2
    assert group_of(optimizer, model, "transformer.h.0.mlp.experts.b1_EF")["weight_decay"] == 0.0


def test_frozen_parameters_are_left_out(small):
    model = InfMoEForCausalLM(hf_config(small("model.train_wz=false")))
    grouped = {id(p) for g in build_optimizer(model, OPTIM).param_groups for p in g["params"]}
    left_out = [n for n, p in model.named_parameters() if id(p) not in grouped]
    assert left_out == ["transformer.h.0.mlp.w_z.weight", "transformer.h.1.mlp.w_z.weight"]


def test_the_state_of_a_parameter_that_is_now_frozen_is_refused():
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, OPTIM)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tensors = optimizer_tensors(model, optimizer)
    model.weight.requires_grad_(False)
    with pytest.raises(InfMoEError, match="trained weight, which the configuration freezes"):
        load_optimizer_tensors(model, build_optimizer(model, OPTIM), tensors)


def test_schedule():
    config = ScheduleConfig(warmup_steps=4, min_lr_ratio=0.1)
    ratios = [lr_ratio(step, 24, config) for step in range(24)]
    assert ratios[:4] == [0.25, 0.5, 0.75, 1.0]
    assert ratios[4] == 1.0
    assert ratios[14] == pytest.approx(0.55)  # half-way down
    assert ratios[23] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 19 / 20)))
    assert all(a > b for a, b in itertools.pairwise(ratios[4:]))


def test_schedule_of_a_run_shorter_than_its_warmup():
    assert [lr_ratio(s, 2, ScheduleConfig(warmup_steps=4)) for s in range(2)] == [0.25, 0.5]
    assert lr_ratio(0, 2, ScheduleConfig(warmup_steps=0)) == 1.0


def test_state_round_trip_continues_bit_for_bit(tmp_path):
    def steps(model, optimizer, count):
        for _ in range(count):
            model(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    optimizer = build_optimizer(model, OPTIM)
    steps(model, optimizer, 3)
    copy = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    copy.load_state_dict(model.state_dict())
    resumed = build_optimizer(copy, OPTIM)
    save_file(optimizer_tensors(model, optimizer), tmp_path / "state")
    load_optimizer_tensors(copy, resumed, load_file(tmp_path / "state"))
    forgetful = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    forgetful.load_state_dict(model.state_dict())
    steps(model, optimizer, 3)
    steps(copy, resumed, 3)
    steps(forgetful, build_optimizer(forgetful, OPTIM), 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))
    assert not torch.equal(model[0].weight, forgetful[0].weight)
