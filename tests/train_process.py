"""What a training process of the tests runs; a module of its own, since processes find it by its name."""

import os
from pathlib import Path


def train_as_the_command_line(config: dict, out: Path, resume: bool, environment: dict[str, str]) -> None:
    """Train in this process and exit as the command line does."""
    os.environ.update(environment)
    import torch

    from infmoe.train import load_config, run

    torch.set_num_threads(2)
    raise SystemExit(run(load_config(config), out, resume).exit_code)
