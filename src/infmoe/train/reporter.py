"""What a run says while it runs: JSON lines, TensorBoard, and a progress bar or plain lines."""

import json
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from infmoe.checkpoint import write_text
from infmoe.errors import InfMoEError

METRICS = "metrics.jsonl"


class Reporter:
    """Writes a run's figures; on every process but the main one it keeps silent.

    The progress bar appears on a terminal; elsewhere each logged step is one plain line.
    """

    def __init__(
        self,
        out: Path,
        *,
        first_step: int,
        num_steps: int,
        batch_tokens: int,
        tensorboard: bool = False,
        active: bool = True,
        console: Console | None = None,
    ):
        """Prepare; files open on entering.

        Args:
            out: the run's folder.
            first_step: steps taken before; later lines of `metrics.jsonl` are dropped.
            num_steps: the run's length.
            batch_tokens: tokens per step.
            tensorboard: write events too.
            active: whether this is the main process.
            console: where to write; None: standard output.
        """
        self.out, self.active, self.tensorboard = out, active, tensorboard
        self.first_step, self.num_steps, self.batch_tokens = first_step, num_steps, batch_tokens
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._stack = ExitStack()
        self._file: TextIO | None = None
        self._events: Any = None
        self._bar: Progress | None = None
        self._seconds, self._timed_steps, self._since = 0.0, 0, 0.0

    def __enter__(self) -> "Reporter":
        self.resume_clock()
        if not self.active:
            return self
        path = self.out / METRICS
        _truncate_metrics(path, self.first_step)
        self._file = self._stack.enter_context(path.open("a"))
        if self.tensorboard:
            self._events = _event_writer(self.out / "tensorboard", purge_step=self.first_step + 1)
            self._stack.callback(self._events.close)
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} tokens/s  ETA"),
                TimeRemainingColumn(),
                console=self.console,
                refresh_per_second=2,  # the thread that draws takes time from the loop
            )
            self._stack.enter_context(self._bar)
            self._task = self._bar.add_task(
                "train", total=self.num_steps, completed=self.first_step, loss=float("nan"), speed=0.0
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def pause_clock(self) -> None:
        """Stop counting seconds towards the speed, for evaluation and checkpoints."""
        self._seconds += time.perf_counter() - self._since

    def resume_clock(self) -> None:
        """Count again."""
        self._since = time.perf_counter()

    def step(self, step: int, loss: float) -> None:
        """A step was taken."""
        self._timed_steps += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=loss)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record a training step's figures, with the speed since the last record."""
        self.pause_clock()
        speed = self._timed_steps * self.batch_tokens / max(self._seconds, 1e-9)
        self._seconds, self._timed_steps = 0.0, 0
        tokens = step * self.batch_tokens
        self._write({"step": step, "tokens": tokens, **metrics, "tokens_per_sec": round(speed, 1)})
        if self._bar is not None:
            self._bar.update(self._task, speed=speed)
        else:
            eta = (self.num_steps - step) * self.batch_tokens / speed
            self.say(
                f"step {step}/{self.num_steps}  loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  "
                f"{speed:,.0f} tokens/s  ETA {_clock(eta)}"
            )
        self.resume_clock()

    def validation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record an evaluation."""
        self._write({"step": step, "tokens": step * self.batch_tokens, **metrics})
        self.say(f"step {step}  val_loss {metrics['val_loss']:.4f} ± {metrics['val_loss_se']:.4f}")

    def say(self, line: str) -> None:
        """One line for the reader."""
        if self.active:
            self.console.print(line, markup=False)

    def sync(self) -> None:
        """Force the metrics to disk, so that a checkpoint never outlives the lines that led to it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise InfMoEError(f"could not write {self.out / METRICS}: {error.strerror}; make room there") from error
        if self._events is not None:
            for key, value in _scalars(record).items():
                self._events.add_scalar(key, value, record["step"])


def _truncate_metrics(path: Path, last_step: int) -> None:
    """Drop the lines after `last_step`, and the half line that a killed run may have left."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_text(path, "".join(kept))


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{name}": number for name, number in value.items()}
        elif key != "step":
            flat[key] = value
    return flat


def _event_writer(folder: Path, purge_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InfMoEError("log.tensorboard needs TensorBoard: pip install 'infmoe[tensorboard]'") from error
    return SummaryWriter(str(folder), purge_step=purge_step)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
