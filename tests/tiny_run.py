"""A small ∞-MoE run, made through the command line, that the tests of evaluation and command line share."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infmoe.cli import main
from infmoe.data import MemorySource, TrainBPE, prepare

MODEL_SETTINGS = (
    "model.vocab_size=320",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.intermediate_size=96",
    "model.max_position_embeddings=32",
    "model.initializer_range=0.2",
)
RUN_SETTINGS = (
    *MODEL_SETTINGS,
    "batch_tokens=256",
    "micro_batch_size=8",
    "steps=4",
    "schedule.warmup_steps=2",
    "eval.every=2",
    "eval.windows=8",
    "checkpoint.every=2",
    "log.every=1",
)


@dataclass(frozen=True)
class TinyRun:
    """What was made.

    Attributes:
        data: prepared data, with a validation split of some hundred windows of the model's context.
        run: the run's folder, with two checkpoints.
    """

    data: Path
    run: Path

    @property
    def checkpoint(self) -> Path:
        """The newer checkpoint."""
        return self.run / "checkpoints" / "step-000004"


def settings(*values: str) -> list[str]:
    """`--set` words."""
    return [word for value in values for word in ("--set", value)]


def documents(count: int = 60) -> tuple[str, ...]:
    """Texts of made-up words, the same at every call."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), size=rng.integers(2, 7))) for _ in range(60)]
    return tuple(" ".join(rng.choice(words, size=120)) for _ in range(count))


def make(folder: Path) -> TinyRun:
    """Prepare the data and train `tiny/infinity`, made smaller, for four steps; once per folder."""
    made = TinyRun(folder / "data", folder / "run")
    if folder.exists():
        return made
    prepare(MemorySource(documents()), made.data, tokenizer=TrainBPE(300), val_fraction=0.3)
    words = ["train", "tiny/infinity", "--data", str(made.data), "--out", str(made.run)]
    assert main([*words, *settings(*RUN_SETTINGS, "model.z_dim=8")]) == 0
    return made
