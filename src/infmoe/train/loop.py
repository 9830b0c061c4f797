"""The training loop.

Everything random is a function of the seed and the step: the data's order, the router's noise, dropout. So a
resumed run goes on as if nothing had happened, and any number of processes may share the work.

B rows, T tokens.
"""

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from infmoe.errors import DivergedError, InfMoEError
from infmoe.train.config import RunConfig
from infmoe.train.elastic import Pass, divergence, passes, set_elastic
from infmoe.train.evaluate import validate
from infmoe.train.optim import lr_ratio, set_lr
from infmoe.train.reporter import Reporter
from infmoe.train.run_dir import Ending, Hold
from infmoe.train.session import Session, seed_dropout
from infmoe.train.signals import StopSignal
from infmoe.train.stats import add_stats, summarize


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: optimizer steps taken in all.
        exit_code: for the shell: 0 when finished, 128 + the signal's number when stopped by one.
        checkpoint: the newest checkpoint.
        val_loss: the last evaluation's loss, where there was one.
    """

    step: int
    exit_code: int
    checkpoint: Path | None
    val_loss: float | None = None


def train(config: RunConfig, out: Path, resume: bool = False) -> TrainResult:
    """Train a model; see `infmoe.train.run`."""
    with Hold(out) as hold:
        with _failure_said(config, hold):
            session = Session.start(config, out, resume, hold)
        reporter = Reporter(
            out,
            first_step=session.first_step,
            num_steps=config.steps,
            batch_tokens=config.batch_tokens,
            tensorboard=config.log.tensorboard,
            active=session.accelerator.is_main_process,
        )
        with session, reporter, StopSignal() as stop:
            with _failure_said(config, hold):
                result = _steps(session, reporter, stop)
            # before a launcher's next signal may end this process
            stopped_by = result.exit_code - 128 if result.exit_code else 0
            hold.end(Ending("stopped", stopped_by) if stopped_by else Ending("finished"))
    return result


@contextmanager
def _failure_said(config: RunConfig, hold: Hold) -> Iterator[None]:
    """Within, what the user can mend is written down as the run's ending; a device that is too small is that too."""
    try:
        try:
            yield
        except torch.OutOfMemoryError as error:
            smaller = (
                [f"a smaller micro_batch_size than {config.micro_batch_size}"] if config.micro_batch_size > 1 else []
            )
            smaller += [] if config.gradient_checkpointing else ["gradient_checkpointing=true"]
            raise InfMoEError(
                f"the device's memory is full: free some and continue with --resume, or start in another --out with "
                f"{' or '.join([*smaller, 'a smaller model'])}"
            ) from error
    except InfMoEError as error:
        with suppress(OSError):  # the disk is full, perhaps
            hold.end(Ending("diverged" if isinstance(error, DivergedError) else "failed", message=str(error)))
        raise


def _steps(session: Session, reporter: Reporter, stop: StopSignal) -> TrainResult:
    """Every step that is left, or those before a signal stops them."""
    config, optimizer, accelerator = session.config, session.optimizer, session.accelerator
    checkpoint, val_loss, stopped_by = session.checkpoint, None, 0
    for step in range(session.first_step + 1, config.steps + 1):
        last = step == config.steps
        logged = last or step % config.log.every == 0
        lr = config.optim.lr * lr_ratio(step - 1, config.steps, config.schedule)
        set_lr(optimizer, lr)
        losses, stats = forward_backward(session, step - 1, with_stats=logged)
        grad_norm = accelerator.clip_grad_norm_(session.model.parameters(), config.optim.clip_norm or math.inf)
        loss, aux_loss, norm, stopped_by = agree(session, losses, grad_norm, stop)
        check_finite(step, loss, norm, lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        reporter.step(step, loss)
        if logged:
            figures = {"loss": loss, "aux_loss": aux_loss, "lr": lr, "grad_norm": norm}
            reporter.log(step, figures | {"routing": summarize(stats, accelerator)})
        reporter.pause_clock()
        if config.eval.every and (last or (step % config.eval.every == 0 and not stopped_by)):
            result = validate(session)
            val_loss = result["val_loss"]
            reporter.validation(step, result)
        if last or stopped_by or step % config.checkpoint.every == 0:
            reporter.sync()
            checkpoint = session.save(step)
        reporter.resume_clock()
        if stopped_by:
            reporter.say(f"stopped by a signal after step {step}; continue with --resume")
            break
    taken = step if session.first_step < config.steps else session.first_step
    return TrainResult(taken, 128 + stopped_by if stopped_by else 0, checkpoint, val_loss)


def forward_backward(session: Session, step: int, *, with_stats: bool) -> tuple[Tensor, list | None]:
    """Gradients of the mean loss over the global batch, weighted over the step's passes (`infmoe.train.elastic`).

    Every micro-batch has the same number of targets, so the mean over micro-batches and processes is the mean
    over tokens.

    Returns:
        float32, shape (2,): this process's mean cross-entropy and auxiliary loss, weighted alike; and, where
        asked for, each layer's routing statistics in the first pass on this process.
    """
    config, accelerator = session.config, session.accelerator
    seed_dropout(config.seed, step, accelerator.process_index)
    losses = torch.zeros(2, device=accelerator.device)
    stats = None
    begun = step >= config.plain_steps
    set_elastic(session.model, begun)
    draws = {"seed": config.seed, "step": step, "num_layers": session.num_layers}
    todo = passes(config.elastic, **draws) if begun else [Pass({})]
    all_weights = session.accumulation * sum(this.weight for this in todo)
    for micro in range(session.accumulation):
        tokens_BT, routing = session.micro_batch(step, micro, stats_tokens=config.log.stats_tokens if with_stats else 1)
        teacher_BTV: Tensor | None = None
        for i, this in enumerate(todo):
            share = this.weight / all_weights
            # gradients travel between processes once per step, with the last pass over the last micro-batch
            is_last = micro == session.accumulation - 1 and i == len(todo) - 1
            with nullcontext() if is_last else accelerator.no_sync(session.model):
                with session.autocast():
                    output = session.model(
                        input_ids=tokens_BT, labels=tokens_BT, routing=this.routing(routing), use_cache=False
                    )
                goal = output.loss if this.text else output.aux_loss
                if this.taught:
                    assert teacher_BTV is not None
                    goal = goal + this.taught * divergence(teacher_BTV, output.logits)
                (goal * share).backward()
            if this.teaches:
                teacher_BTV = output.logits.detach()
            loss, aux_loss = output.loss.detach().float(), output.aux_loss.detach().float()
            losses += torch.stack([loss - aux_loss, aux_loss]) * share
            if with_stats and i == 0:
                stats = add_stats(stats, output.routing_stats)
    return losses, stats


def agree(session: Session, losses: Tensor, grad_norm: Tensor, stop: StopSignal) -> tuple[float, float, float, int]:
    """What all processes hold to be true: losses, the gradient's norm, and the signal to stop by (or 0).

    One collective and one wait for the device; the loop has no other.
    """
    accelerator = session.accelerator
    mine = torch.cat([losses / accelerator.num_processes, losses.new_tensor([float(stop.number > 0)])])
    loss, aux_loss, stopping, norm = torch.cat([accelerator.reduce(mine, "sum"), grad_norm.float()[None]]).tolist()
    if not stopping:
        return loss, aux_loss, norm, 0
    return loss, aux_loss, norm, stop.number or signal.SIGTERM


def check_finite(step: int, loss: float, grad_norm: float, lr: float) -> None:
    """Raise before a broken gradient reaches the weights.

    Raises:
        DivergedError: the loss or the gradient's norm is not finite.
    """
    for what, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            raise DivergedError(
                f"the {what} is {value} at step {step} (learning rate {lr:.2e}): stopped before the update; "
                f"start anew with a lower optim.lr or a longer schedule.warmup_steps"
            )
