"""What a training process of the tests runs; a module of its own, since processes find it by its name."""

import os
from pathlib import Path
from typing import Any


def train_as_the_command_line(config: dict, out: Path, resume: bool, environment: dict[str, str]) -> None:
    """Train in this process and exit as the command line does."""
    os.environ.update(environment)
    import torch

    from infmoe.train import load_config, run

    torch.set_num_threads(2)
    raise SystemExit(run(load_config(config), out, resume).exit_code)


def state_after_a_step(config: dict, rendezvous: str, rank: int, results: Any) -> None:
    """Put parameter -> entries of its state that this one of two processes holds after a step into `results`."""
    import torch
    import torch.distributed as dist

    from infmoe.hf import InfMoEForCausalLM
    from infmoe.train import load_config
    from infmoe.train.config import hf_config
    from infmoe.train.optim import build_optimizer

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    run = load_config(config)
    model = InfMoEForCausalLM(hf_config(run))
    optimizer = build_optimizer(model, run.optim)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    state = optimizer.optim.state  # type: ignore[attr-defined]
    names = {param: name for name, param in model.named_parameters()}
    results.put({names[p]: sum(v.numel() for v in entries.values() if v.ndim) for p, entries in state.items()})
    dist.destroy_process_group()
