"""Runs that are killed, signalled, or spread over processes."""

import json
import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_process import state_after_a_step

from infmoe import checkpoint as ckpt
from infmoe.hf import InfMoEForCausalLM
from infmoe.train.config import hf_config


def logged_steps(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:  # the line that is being written
            break
    return [r for r in records if "loss" in r]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(ckpt.resolve_checkpoint(out) / "model.safetensors")


def wait(processes: list) -> list[int]:
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def wait_for_step(process, out: Path, step: int) -> None:
    while process.is_alive() and not any(r["step"] >= step for r in logged_steps(out)):
        process.join(0.002)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_killed_three_times_and_resumed_is_bit_identical(small, start_training, tmp_path):
    config = small("steps=30", "checkpoint.every=4", "eval.every=10", "model.resid_pdrop=0.1")
    other_seed = small("steps=30", "checkpoint.every=4", "eval.every=10", "model.resid_pdrop=0.1", "seed=1")
    assert wait(start_training(config, tmp_path / "whole")) == [0]
    assert wait(start_training(other_seed, tmp_path / "control")) == [0]

    killed = tmp_path / "killed"
    moments = random.Random()
    for low, high in ((1, 8), (11, 17), (19, 25)):
        (process,) = start_training(config, killed, resume=True)
        wait_for_step(process, killed, moments.randint(low, high))
        process.join(moments.uniform(0, 0.02))
        process.kill()
        assert wait([process]) == [-signal.SIGKILL]
    assert wait(start_training(config, killed, resume=True)) == [0]

    assert same(weights(tmp_path / "whole"), weights(killed))
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "control"))
    timeless = [
        [{k: v for k, v in r.items() if k != "tokens_per_sec"} for r in logged_steps(out)]
        for out in (tmp_path / "whole", killed)
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_saves_and_stops(number, ranks, small, start_training, tmp_path):
    config = small("steps=4000", "checkpoint.every=4000", "eval.every=null", "micro_batch_size=4")
    processes = start_training(config, tmp_path / "run", ranks=ranks)
    wait_for_step(processes[0], tmp_path / "run", 3)
    os.kill(processes[-1].pid, number)  # one rank hears it, all stop
    assert wait(processes) == [128 + number] * ranks
    steps = [r["step"] for r in logged_steps(tmp_path / "run")]
    saved = ckpt.resolve_checkpoint(tmp_path / "run")
    assert saved.name == f"step-{steps[-1]:06d}"
    assert steps == list(range(1, steps[-1] + 1))


SANDWICH = ("elastic.keep_ratio=[0.125,0.5]", "elastic.rule=sandwich", "elastic.distill=true", "batch_tokens=512")


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("infinity", ()),
        ("moe", ("elastic.num_experts_per_tok=[1,2,3]", "model.ideal_experts_per_tok=4")),
        ("infinity", SANDWICH),  # two passes over two micro-batches in each process
    ],
    ids=["infinity", "moe", "sandwich"],
)
def test_two_processes_train_as_one(variant, settings, small, start_training, tmp_path):
    # micro-batches of 4 rows in both, which the balance loss depends on
    config = small("micro_batch_size=4", *settings, variant=variant)
    assert wait(start_training(config, tmp_path / "one")) == [0]
    assert wait(start_training(config, tmp_path / "two", ranks=2)) == [0, 0]
    records = [logged_steps(tmp_path / name) for name in ("one", "two")]
    assert [r["step"] for r in records[0]] == list(range(1, 7))
    for a, b in zip(*records, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["routing"] == pytest.approx(b["routing"], rel=1e-3)


def test_a_sharded_optimizer_trains_as_a_whole_one_and_either_goes_on_from_the_other(small, start_training, tmp_path):
    """ZeRO-1: the same weights and the same state in the checkpoint, to the last bit."""
    # the map to σ has no gradient at z = μ, so neither has it a state
    settings = ("micro_batch_size=4", "model.train_wz=false", "model.routing_mode=mu", "model.wz_lr_factor=0.5")
    whole, sharded = small(*settings), small(*settings, "optim.zero_stage=1")
    half = {name: tmp_path / name for name in ("whole", "sharded", "then whole", "then sharded")}
    assert wait(start_training(whole, half["whole"], ranks=2)) == [0, 0]
    assert wait(start_training(sharded, half["sharded"], ranks=2)) == [0, 0]
    for name, config in (("then whole", whole), ("then sharded", sharded)):
        source = half["sharded" if config is whole else "whole"]
        shutil.copytree(source, half[name], ignore=shutil.ignore_patterns("step-000006"))
        assert ckpt.resolve_checkpoint(half[name]).name == "step-000004"
        assert wait(start_training(config, half[name], ranks=2, resume=True)) == [0, 0]
    expected = load_file(ckpt.resolve_checkpoint(half["whole"]) / ckpt.OPTIMIZER)
    assert expected
    for out in half.values():
        assert same(weights(out), weights(half["whole"])), out
        assert same(load_file(ckpt.resolve_checkpoint(out) / ckpt.OPTIMIZER), expected), out
    # one process has nobody to share with
    shutil.copytree(half["sharded"], tmp_path / "one", ignore=shutil.ignore_patterns("step-000006"))
    assert wait(start_training(sharded, tmp_path / "one", resume=True)) == [0]
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(tensor, weights(half["whole"])[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_sharded_optimizer_keeps_a_share_of_the_state(small, tmp_path):
    """Two processes hold each parameter's state once between them, about as much each."""
    context = multiprocessing.get_context("spawn")
    results, init = context.Queue(), f"file://{tmp_path}/rendezvous"
    config = small("optim.zero_stage=1").to_dict()
    processes = [
        context.Process(target=state_after_a_step, args=(config, init, rank, results), daemon=True) for rank in range(2)
    ]
    for process in processes:
        process.start()
    held = [results.get(timeout=60) for _ in processes]
    assert wait(processes) == [0, 0]
    model = InfMoEForCausalLM(hf_config(small()))
    assert sorted([*held[0], *held[1]]) == sorted(name for name, _ in model.named_parameters())
    assert max(sum(h.values()) for h in held) < 0.6 * 2 * sum(p.numel() for p in model.parameters())
