"""Exact resumption: a run that is killed and resumed ends in the weights of one that was not."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from infmoe.bench.common import Measured, Rows, tiny_run
from infmoe.checkpoint import resolve_checkpoint
from infmoe.errors import InfMoEError

NUM_KILLS = 3
THREADS = 2


def kill_and_resume(*, quick: bool = False) -> Measured:
    """Compare SHA-256 of the final weights: uninterrupted, killed by SIGKILL at random moments, another seed."""
    steps, every = (40, 10) if quick else (200, 20)
    rng = random.Random(0)
    os.environ["OMP_NUM_THREADS"] = str(THREADS)  # for the processes started below
    with tiny_run() as (config, folder):
        data = config.data.dir

        def command(out: Path, *more: str) -> list[str]:
            settings = [f"steps={steps}", f"checkpoint.every={every}", f"data.dir={data}", "eval.every=null"]
            settings += ["batch_tokens=1024", "micro_batch_size=8", "log.every=1"]
            flags = [word for setting in settings for word in ("--set", setting)]
            return [
                sys.executable,
                "-m",
                "infmoe",
                "train",
                "tiny/infinity",
                "--out",
                str(out),
                *flags,
                *more,
            ]

        def finish(out: Path, *more: str) -> str:
            done = subprocess.run(command(out, *more), capture_output=True, text=True)
            if done.returncode:
                said = done.stderr.strip().splitlines() or ["it says nothing"]
                raise InfMoEError(f"training in {out.name} ended with {done.returncode}: {said[-1]}")
            return hashlib.sha256((resolve_checkpoint(out) / "model.safetensors").read_bytes()).hexdigest()

        reference = finish(folder / "whole")
        killed_dir = folder / "killed"
        kills = sorted(rng.sample(range(every // 2, steps - every // 2), NUM_KILLS))
        for number, step in enumerate(kills):
            process = subprocess.Popen(
                command(killed_dir, *(["--resume"] if number else [])),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            while process.poll() is None and _steps_logged(killed_dir) < step:
                time.sleep(0.02)
            if process.poll() is not None:
                raise InfMoEError(f"the run ended with {process.returncode} before step {step}: nothing was killed")
            time.sleep(rng.uniform(0, 0.3))  # anywhere in a step, or in the writing of a checkpoint
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        killed = finish(folder / "killed", "--resume")
        other = finish(folder / "other", "--set", "seed=1")
    rows: Rows = [
        {"run": "uninterrupted", "sha256": reference},
        {"run": "killed and resumed", "sha256": killed, "killed_after_steps": kills},
        {"run": "another seed", "sha256": other},
    ]
    return rows, {
        "steps": steps,
        "kills": len(kills),
        "threads": THREADS,
        "bit_identical": killed == reference,
        "other_seed_differs": other != reference,
    }


def _steps_logged(run_dir: Path) -> int:
    """The last step in a run's metrics; 0 before the first."""
    path = run_dir / "metrics.jsonl"
    return sum('"loss"' in line for line in path.read_text().splitlines()) if path.is_file() else 0
