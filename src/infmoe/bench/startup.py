"""Start-up: what a user waits before anything happens."""

import subprocess
import sys
import time

from infmoe.bench.common import Measured, Rows, spread


def startup(*, quick: bool = False) -> Measured:
    """Wall seconds of whole processes, taking turns."""
    rounds = 3 if quick else 9
    commands = {
        "infmoe --help": [sys.executable, "-m", "infmoe", "--help"],
        "import torch": [sys.executable, "-c", "import torch"],
        "import torch, infmoe": [sys.executable, "-c", "import torch, infmoe"],
        "import torch, infmoe.layers": [sys.executable, "-c", "import torch, infmoe.layers"],
        "import torch, infmoe.hf": [sys.executable, "-c", "import torch, infmoe.hf"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds + 1):
        for name, command in commands.items():
            begin = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - begin)
    rows: Rows = [{"arm": name, "unit": "s", **spread(times[1:])} for name, times in seconds.items()]
    medians = {row["arm"]: row["median"] for row in rows}
    return rows, {
        "help_seconds": medians["infmoe --help"],
        "help_limit": 0.7,
        "import_infmoe_adds_seconds": medians["import torch, infmoe"] - medians["import torch"],
        "import_limit": 1.0,
        "rounds": rounds,
    }
