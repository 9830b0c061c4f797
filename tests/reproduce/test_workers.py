"""Several workers side by side."""

import types

import pytest

from infmoe.errors import InfMoEError
from infmoe.reproduce import workers


def test_workers_side_by_side_report_the_first_that_failed():
    assert workers.start_workers(["recipes"], 2) == 0
    assert workers.start_workers(["no-such-command"], 2) == 2


@pytest.mark.parametrize(
    ("visible", "shares"),
    [(None, ["0,2", "1"]), ("4,5,7", ["4,7", "5"]), ("GPU-a,GPU-b,GPU-c", ["GPU-a,GPU-c", "GPU-b"])],
)
def test_workers_share_the_gpus(monkeypatch, visible, shares):
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    seen = []
    child_of = lambda words, env: seen.append(env["CUDA_VISIBLE_DEVICES"]) or types.SimpleNamespace(wait=lambda: 0)  # noqa: E731
    monkeypatch.setattr(workers, "subprocess", types.SimpleNamespace(Popen=child_of))
    assert workers.start_workers(["recipes"], 2) == 0
    assert seen == shares
    with pytest.raises(InfMoEError, match="--jobs 4 is more than the 3 GPUs here"):
        workers.start_workers(["recipes"], 4)
    assert len(seen) == 2
