"""Several workers side by side, each with its share of the cores and of the GPUs."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import torch

from infmoe.errors import InfMoEError


def _gpu_shares(jobs: int) -> list[dict[str, str]]:
    """What each worker's environment says of the GPUs that it may use; nothing where there are none."""
    count = torch.cuda.device_count()
    if not count:
        return [{}] * jobs
    if jobs > count:
        raise InfMoEError(
            f"--jobs {jobs} is more than the {count} GPUs here, and two runs on one would share it: take --jobs {count}"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",")[:count] if visible else [str(i) for i in range(count)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[i::jobs])} for i in range(jobs)]


def start_workers(command: Sequence[str], jobs: int) -> int:
    """Run `jobs` workers side by side, each with its share of the cores and of the GPUs.

    Returns:
        The first exit code that is not 0.

    Raises:
        InfMoEError: there are GPUs, but fewer than workers.
    """
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads)
    words = [sys.executable, "-m", "infmoe", *command]
    shares = _gpu_shares(jobs)
    workers: list[subprocess.Popen] = []

    def stop(*_: object) -> None:
        for worker in workers:
            worker.terminate()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        for share in shares:
            workers.append(subprocess.Popen(words, env=environment | share))
        codes = [worker.wait() for worker in workers]
    except KeyboardInterrupt:
        for worker in workers:
            worker.wait()
        raise
    except OSError:  # one could not be started
        stop()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return next((code if code > 0 else 128 - code for code in codes if code), 0)
