"""Training: `run` takes a configuration from `infmoe.recipes` and an output folder.

Importing this package is cheap; torch and transformers come with the first call that needs them.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from infmoe.train.config import RunConfig as RunConfig
from infmoe.train.config import apply_overrides as apply_overrides
from infmoe.train.config import load_config as load_config

if TYPE_CHECKING:
    from infmoe.train.loop import TrainResult


def run(config: RunConfig, out: Path | str, resume: bool = False) -> "TrainResult":
    """Train a model, on the processes that `torchrun` or `accelerate launch` started, or on this one alone.

    SIGINT and SIGTERM finish the current step, write a checkpoint and return.

    Args:
        config: the run; its `data.dir` must be set.
        out: the run's folder: `run.json`, `metrics.jsonl` and `checkpoints/`.
        resume: continue the run in `out` from its newest checkpoint that verifies; start where there is none.

    Raises:
        InfMoEError: a mistake in the configuration, the data or the folder, a full disk, a loss that is not
            finite. What was saved stays.
    """
    from infmoe.train.loop import train

    return train(config, Path(out), resume)


def dry_run(config: RunConfig) -> str:
    """The resolved configuration and what the model costs, for reading; nothing is allocated or written."""
    from infmoe.train.description import describe

    return describe(config)
