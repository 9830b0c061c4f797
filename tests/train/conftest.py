"""A small corpus, a smaller model, and processes to train it in."""

import multiprocessing
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from train_process import train_as_the_command_line

from infmoe.checkpoint import resolve_checkpoint
from infmoe.data import MemorySource, TrainBPE, prepare
from infmoe.recipes import recipe
from infmoe.train import RunConfig, apply_overrides, run

# 2 layers of width 32, 8 rows of 32 tokens per step
SMALL = (
    "model.vocab_size=320",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.intermediate_size=64",
    "model.max_position_embeddings=32",
    "precision=fp32",
    "batch_tokens=256",
    "micro_batch_size=8",
    "steps=6",
    "schedule.warmup_steps=2",
    "eval.every=3",
    "eval.windows=10",
    "checkpoint.every=2",
    "log.every=1",
)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), size=rng.integers(2, 7))) for _ in range(60)]
    documents = [" ".join(rng.choice(words, size=120)) for _ in range(60)]
    folder = tmp_path_factory.mktemp("corpus") / "data"
    prepare(MemorySource(documents), folder, tokenizer=TrainBPE(300), val_fraction=0.2)
    return folder


@pytest.fixture(scope="session")
def small(data_dir: Path):
    """Make a configuration that trains in a second: `small("optim.lr=1", variant="moe")`."""

    def make(*overrides: str, variant: str = "infinity") -> RunConfig:
        z_dim = ("model.z_dim=8",) if variant.startswith("infinity") else ()
        return apply_overrides(recipe(f"tiny/{variant}"), [*SMALL, *z_dim, f"data.dir={data_dir}", *overrides])

    return make


@pytest.fixture(scope="session")
def start_training():
    """Start `train` in a process of its own; one server imports torch once for all of them."""
    # idle OpenMP threads that spin would starve each other on a busy machine
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["infmoe.train.loop"])
    started = []

    def start(config: RunConfig, out: Path, *, resume: bool = False, ranks: int = 1) -> list:
        environments: list[dict[str, str]] = [{}]
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            shared = {
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            environments = [shared | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]
        processes = [
            context.Process(target=train_as_the_command_line, args=(config.to_dict(), out, resume, environment))
            for environment in environments
        ]
        for process in processes:
            process.start()
        started.extend(processes)
        return processes

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def two_processes_train_as_one(start_training, tmp_path):
    """Check that two processes end in the weights that one ends in."""

    def check(config: RunConfig) -> None:
        for process in start_training(config, tmp_path / "two", ranks=2):
            process.join(120)
            assert process.exitcode == 0
        assert run(config, tmp_path / "one").exit_code == 0
        one, two = (load_file(resolve_checkpoint(tmp_path / n) / "model.safetensors") for n in ("one", "two"))
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)

    return check
