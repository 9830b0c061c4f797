"""The command line as a process of its own: start-up, pipes and signals."""

import os
import signal
import subprocess
import sys
import time

from tiny_run import RUN_SETTINGS, settings

ENVIRONMENT = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
INFMOE = (sys.executable, "-m", "infmoe")


def test_help_is_quick_and_light():
    """The quickest of three, so that a busy machine does not count."""
    code = (
        "import sys; from infmoe.cli import main; assert main(['--help']) == 0; "
        "assert not {'torch', 'transformers', 'numpy', 'matplotlib'} & sys.modules.keys()"
    )
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - begin)
        assert done.returncode == 0, done.stderr
        assert "evaluate" in done.stdout
    assert min(seconds) < 0.7


def test_a_mistake_in_a_process():
    done = subprocess.run([*INFMOE, "params", "tiny/infinit"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: unknown recipe 'tiny/infinit'; did you mean 'tiny/infinity'?\n"


def test_a_reader_that_leaves():
    process = subprocess.Popen([*INFMOE, "recipes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_interrupted_training_ends_in_a_checkpoint(tiny_run, tmp_path):
    words = ["train", "tiny/infinity", "--data", tiny_run.data, "--out", tmp_path / "run"]
    endless = settings(*RUN_SETTINGS, "model.z_dim=8", "steps=1000000", "checkpoint.every=1000000")
    process = subprocess.Popen(
        [*INFMOE, *words, *endless],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdout.readline().startswith("step 1/1000000")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ""
    assert "continue with --resume" in out.splitlines()[-1]
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1
