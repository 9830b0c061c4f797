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

NUM_KILLS = 3


def kill_and_resume(*, quick: bool = False) -> Measured:
    """Compare SHA-256 of the final weights: uninterrupted, killed by SIGKILL at random moments, another seed."""
    steps, every = (40, 10) if quick else (200, 20)
    rng = random.Random(0)
    with tiny_run() as (config, folder):
        data = config.data.dir

        def command(out: Path, *more: str) -> list[str]:
            settings = [f"steps={steps}", f"checkpoint.every={every}", f"data.dir={data}", "eval.every=null"]
            settings += ["batch_tokens=1024", "micro_batch_size=8"]
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
            subprocess.run(command(out, *more), check=True, capture_output=True)
            return hashlib.sha256((resolve_checkpoint(out) / "model.safetensors").read_bytes()).hexdigest()

        begin = time.perf_counter()
        reference = finish(folder / "whole")
        whole_seconds = time.perf_counter() - begin

        kills = []
        for kill in range(NUM_KILLS):
            process = subprocess.Popen(
                command(folder / "killed", *(["--resume"] if kill else [])),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            delay = rng.uniform(0.2, 0.6) * whole_seconds
            time.sleep(delay)
            ended_first = process.poll() is not None
            if not ended_first:
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
            folders = sorted(p.name for p in (folder / "killed" / "checkpoints").glob("*"))
            kills.append({"after_seconds": delay, "ended_first": ended_first, "checkpoints": folders})
        killed = finish(folder / "killed", "--resume")
        other = finish(folder / "other", "--set", "seed=1")
    rows: Rows = [
        {"run": "uninterrupted", "sha256": reference},
        {"run": "killed and resumed", "sha256": killed, "kills": kills},
        {"run": "another seed", "sha256": other},
    ]
    return rows, {
        "steps": steps,
        "kills": sum(not k["ended_first"] for k in kills),
        "bit_identical": killed == reference,
        "other_seed_differs": other != reference,
    }
