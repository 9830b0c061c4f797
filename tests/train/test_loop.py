"""Training in this process."""

import errno
import io
import json
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from infmoe import checkpoint as ckpt
from infmoe.checkpoint import resolve_checkpoint
from infmoe.data import TokenData
from infmoe.errors import DivergedError, InfMoEError
from infmoe.hf import InfMoEForCausalLM
from infmoe.layers.routing import NoiseKey, Routing
from infmoe.train import loop, run, run_dir, session
from infmoe.train.config import hf_config
from infmoe.train.description import describe
from infmoe.train.reporter import Reporter
from infmoe.train.run_dir import Ending, Hold, read_ending
from infmoe.train.signals import StopSignal


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [r["loss"] for r in metrics(out) if "loss" in r]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(resolve_checkpoint(out) / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def finished(small, tmp_path):
    """A finished run of six steps."""
    out = tmp_path / "finished"
    assert run(small(), out).exit_code == 0
    return out


def test_how_a_run_ended_is_said_and_forgotten_when_it_goes_on(small, tmp_path, monkeypatch):
    out = tmp_path / "run"
    assert run(small(), out).exit_code == 0
    assert read_ending(out) == Ending("finished")
    seen = []
    monkeypatch.setattr(loop, "_steps", lambda *_: seen.append(read_ending(out)) or loop.TrainResult(6, 143, None))
    assert run(small(), out, resume=True).exit_code == 143
    assert seen == [None]
    assert read_ending(out) == Ending("stopped", 15)
    for error, how in ((DivergedError("oh"), "diverged"), (InfMoEError("oh"), "failed")):
        monkeypatch.setattr(loop, "_steps", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            run(small(), out, resume=True)
        assert read_ending(out) == Ending(how, message="oh")


@pytest.mark.parametrize("where", ["_steps", "Session.start"])
def test_a_device_that_is_too_small_ends_the_run_in_a_line(small, tmp_path, monkeypatch, where):
    start = loop.Session.start

    def full(*args):
        if where == "Session.start":
            start(*args)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(loop.Session if where == "Session.start" else loop, where.rpartition(".")[2], full)
    with pytest.raises(
        InfMoEError, match="a smaller micro_batch_size than 4 or gradient_checkpointing=true or"
    ) as said:
        run(small("micro_batch_size=4"), tmp_path / "run")
    assert read_ending(tmp_path / "run") == Ending("failed", message=str(said.value))
    with pytest.raises(InfMoEError, match=r"another --out with a smaller model$"):
        run(small("micro_batch_size=1", "gradient_checkpointing=true"), tmp_path / "least")


def test_a_run_that_another_process_trains_is_refused(small, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    with Hold(out) as hold:
        hold.take()
        with pytest.raises(InfMoEError, match="another process trains in"):
            run(small(), out)
        assert not (out / "run.json").exists()
    assert run(small(), out).exit_code == 0


def test_a_filesystem_without_locks_keeps_nobody_off(small, tmp_path, monkeypatch):
    def refuse(path):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_dir, "take_lock", refuse)
    assert run(small(), tmp_path / "run").exit_code == 0
    assert read_ending(tmp_path / "run") == Ending("finished")


def test_what_a_run_leaves(finished, small, data_dir):
    assert sorted(p.name for p in finished.iterdir()) == [
        "checkpoints",
        "ended.json",
        "metrics.jsonl",
        "run.json",
        "run.lock",
    ]
    assert [p.name for p in ckpt.checkpoints(finished)] == ["step-000004", "step-000006"]  # keep_last=2
    newest = resolve_checkpoint(finished)
    files = {p.name for p in newest.iterdir()}
    assert {"config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json"} <= files
    assert {p.rpartition(".")[2] for p in files} == {"json", "safetensors"}  # no pickle
    state = ckpt.read_state(newest)
    assert (state["step"], state["tokens"]) == (6, 6 * 256)
    assert state["config"] == small().to_dict() == json.loads((finished / "run.json").read_text())["config"]
    model = InfMoEForCausalLM.from_pretrained(newest)
    assert model.config.eos_token_id is not None
    assert model.lm_head.weight is model.transformer.wte.weight


def test_metrics(finished):
    records = metrics(finished)
    train = [r for r in records if "loss" in r]
    assert [r["step"] for r in train] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "val_loss" in r] == [3, 6]
    last = train[-1]
    assert last["tokens"] == 6 * 256
    assert last["tokens_per_sec"] > 0
    assert last["grad_norm"] > 0
    assert [r["lr"] for r in train[:3]] == pytest.approx([1e-3, 2e-3, 2e-3])
    routing = last["routing"]
    assert 0 < routing["entropy"] <= 1
    assert 0.25 <= routing["union_ratio"] <= 0.5
    assert routing["sigma"] > 0
    assert routing["sigma_to_mu"] > 0
    assert {"overlap_ratio", "dead_ratio", "max_load"} <= routing.keys()


def test_validation_is_the_mean_over_windows_spread_over_the_split(finished, small, data_dir):
    model = InfMoEForCausalLM.from_pretrained(resolve_checkpoint(finished)).eval()
    data = TokenData.open(data_dir)
    available = data.num_windows("val", 32)
    assert available > 20
    each = []
    with torch.no_grad():
        for window in [i * available // 10 for i in range(10)]:
            routing = Routing(key=NoiseKey(seed=0, stream=torch.tensor([window])))
            row = torch.from_numpy(data.windows("val", np.array([window]), 32))
            each.append(float(model(input_ids=row, labels=row, routing=routing).loss))
    record = metrics(finished)[-1]
    assert record["val_windows"] == 10
    assert record["val_loss"] == pytest.approx(np.mean(each), abs=1e-5)
    assert record["val_loss_se"] == pytest.approx(np.std(each, ddof=1) / 10**0.5, rel=1e-3)


def test_the_loss_falls(small, tmp_path):
    run(small("steps=60", "optim.lr=1e-2", "eval.every=null", "checkpoint.every=60"), tmp_path)
    assert np.mean(losses(tmp_path)[-5:]) < losses(tmp_path)[0] - 0.8


def test_accumulation_weights_micro_batches_exactly(small, tmp_path):
    for micro in (8, 2, 1):
        run(small(f"micro_batch_size={micro}", "model.keep_ratio=1.0"), tmp_path / str(micro))
    for micro in (2, 1):
        assert losses(tmp_path / str(micro)) == pytest.approx(losses(tmp_path / "8"), abs=1e-5)
        norms = [[r["grad_norm"] for r in metrics(tmp_path / n) if "loss" in r] for n in (str(micro), "8")]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_gradient_checkpointing_changes_nothing(small, finished, tmp_path):
    run(small("gradient_checkpointing=true"), tmp_path / "checkpointing")
    assert losses(tmp_path / "checkpointing") == pytest.approx(losses(finished), abs=1e-6)


def test_bf16_runs_near_fp32_and_keeps_float32_weights(small, finished, tmp_path):
    run(small("precision=bf16"), tmp_path / "bf16")
    assert losses(tmp_path / "bf16") == pytest.approx(losses(finished), abs=0.05)
    assert losses(tmp_path / "bf16") != losses(finished)
    assert {t.dtype for t in weights(tmp_path / "bf16").values()} == {torch.float32}


@pytest.mark.parametrize("variant", ["dense", "switch", "moe-hash", "infinity-glu", "infinity-frozen-wz"])
def test_variants_train(variant, small, tmp_path):
    result = run(small("steps=2", variant=variant), tmp_path)
    assert (result.step, result.exit_code) == (2, 0)
    assert result.val_loss is not None
    assert np.isfinite(losses(tmp_path)).all()


def test_auxiliary_loss_is_told_apart(small, tmp_path):
    run(small("steps=1", "model.balance_loss_weight=0.5", variant="moe"), tmp_path / "heavy")
    run(small("steps=1", "model.balance_loss_weight=0.0", variant="moe"), tmp_path / "none")
    heavy, none = metrics(tmp_path / "heavy")[0], metrics(tmp_path / "none")[0]
    assert heavy["loss"] == pytest.approx(none["loss"], abs=1e-5)
    assert none["aux_loss"] == 0.0
    assert heavy["aux_loss"] == pytest.approx(2 * 0.5, rel=0.1)  # two layers near balance


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("model.num_experts_per_tok=1",), True),
        (("model.num_experts_per_tok=[1,1]",), True),
        (("model.num_experts_per_tok=[1,2]",), True),
        (("model.num_experts_per_tok=[2,2]",), False),
        (("model.num_experts_per_tok=1", "model.gate_norm=all"), False),
        (("model.num_experts_per_tok=1", "model.expert_router=hash"), False),
        (("model.num_experts_per_tok=1", "model.gate_norm=trained"), True),
        (("model.num_experts_per_tok=1", "model.gate_norm=trained", "model.trained_experts_per_tok=2"), False),
        (("model.num_experts_per_tok=1", "elastic.num_experts_per_tok=[1]"), True),
        (("model.num_experts_per_tok=1", "elastic.num_experts_per_tok=[1,2]"), False),
    ],
)
def test_a_router_that_the_text_does_not_train_is_remarked(settings, said, small, tmp_path, capsys):
    config = small("steps=1", *settings, variant="moe")
    run(config, tmp_path)
    assert ("so the text does not train such a layer's router" in capsys.readouterr().err) == said
    assert ("so the text does not train such a layer's router" in describe(config)) == said
    # only the balance loss reaches the router where it is said
    model = InfMoEForCausalLM(hf_config(config))
    ids = torch.randint(model.config.vocab_size, (1, 8), generator=torch.Generator().manual_seed(0))
    output = model(ids, labels=ids)
    (output.loss - output.aux_loss).backward()
    moved = [float(h.mlp.router.weight.grad.abs().max()) for h in model.transformer.h if h.mlp.router]
    if "elastic" not in settings[-1]:  # whose other steps take two
        assert any(grad < 1e-7 for grad in moved) == said


def interrupt_after(monkeypatch, step: int) -> None:
    """Raise SIGINT while `step` is computed."""
    forward_backward = loop.forward_backward

    def interrupted(s, number, **kwargs):
        if number + 1 == step:
            signal.raise_signal(signal.SIGINT)
        return forward_backward(s, number, **kwargs)

    monkeypatch.setattr(loop, "forward_backward", interrupted)


def test_interrupted_and_resumed_is_bit_identical(small, finished, tmp_path, monkeypatch):
    out = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        result = run(small(), out)
    assert (result.step, result.exit_code) == (3, 130)
    assert result.checkpoint == out / "checkpoints" / "step-000003"
    # how it reports changes nothing
    result = run(small("log.every=2", "eval.every=6", "checkpoint.every=5"), out, resume=True)
    assert (result.step, result.exit_code) == (6, 0)
    assert same(weights(out), weights(finished))
    assert [r["step"] for r in metrics(out) if "loss" in r] == [1, 2, 3, 4, 6]


def test_a_frozen_w_z_stays_as_it_began_when_resumed(small, tmp_path, monkeypatch):
    config = small("optim.lr=1e-2", variant="infinity-frozen-wz")
    torch.manual_seed(config.seed)
    begun = InfMoEForCausalLM(hf_config(config)).state_dict()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert run(config, tmp_path).step == 3
    assert run(config, tmp_path, resume=True).step == 6
    ended = weights(tmp_path)
    changed = {name for name in ended if not torch.equal(ended[name], begun[name])}
    assert set(ended) - changed == {f"transformer.h.{i}.mlp.w_z.weight" for i in range(2)}


def test_resume_drops_what_came_after_the_checkpoint(small, finished, tmp_path):
    before, expected = metrics(finished), weights(finished)
    newest = ckpt.checkpoints(finished)[-1]
    data = bytearray((newest / "optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "optimizer.safetensors").write_bytes(data)
    with (finished / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    result = run(small(), finished, resume=True)
    assert (result.step, result.exit_code) == (6, 0)

    def timeless(records):
        return [{k: v for k, v in r.items() if k != "tokens_per_sec"} for r in records]

    assert timeless(metrics(finished)) == timeless(before)
    assert same(weights(finished), expected)


def test_resume_refuses_a_changed_run(small, finished):
    with pytest.raises(InfMoEError, match=r"other values of model\.z_dim, optim\.lr, seed; restore them"):
        run(small("optim.lr=1", "seed=3", "model.z_dim=4"), finished, resume=True)


def test_resume_refuses_other_data(small, finished, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    assert run(small(f"data.dir={tmp_path / 'data'}"), finished, resume=True).step == 6
    manifest = tmp_path / "data" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(InfMoEError, match=r"other values of the contents of data\.dir"):
        run(small(f"data.dir={tmp_path / 'data'}"), finished, resume=True)


def test_the_data_is_named_from_anywhere(small, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(data_dir.parent)
    run(small("data.dir=data", "steps=1"), tmp_path / "run")
    for record in (tmp_path / "run" / "run.json", resolve_checkpoint(tmp_path / "run") / ckpt.TRAINER_STATE):
        assert json.loads(record.read_text())["config"]["data"]["dir"] == str(data_dir)
    monkeypatch.chdir(tmp_path)
    assert ckpt.training_data(tmp_path / "run") == data_dir


def test_a_folder_that_holds_a_run_is_refused(small, finished, tmp_path, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    with pytest.raises(InfMoEError, match=r"holds a finished run \(tiny/infinity\) with this configuration"):
        run(small(), finished)
    with pytest.raises(InfMoEError, match=r"holds a finished run .* with another configuration"):
        run(small("seed=1"), finished)
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    interrupt_after(monkeypatch, 3)
    run(small(), tmp_path / "half")
    with pytest.raises(InfMoEError, match=r"a run at step 3 of 6 .*: pass --resume to continue it"):
        run(small(), tmp_path / "half")
    with pytest.raises(InfMoEError, match=r"holds a model but no run\.json"):
        run(small(), resolve_checkpoint(finished))


def test_resuming_a_finished_run_does_nothing(small, finished):
    before = metrics(finished)
    result = run(small(), finished, resume=True)
    assert (result.step, result.exit_code, result.checkpoint) == (6, 0, resolve_checkpoint(finished))
    assert metrics(finished) == before


def test_resume_in_an_empty_folder_starts(small, tmp_path, capsys):
    assert run(small("steps=1"), tmp_path, resume=True).step == 1
    assert "starting anew" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["loss", "gradient norm"])
def test_what_is_not_finite_stops_before_the_update(broken, small, finished, tmp_path, monkeypatch):
    forward_backward = loop.forward_backward

    def poisoned(s, step, **kwargs):
        result, stats = forward_backward(s, step, **kwargs)
        if step == 4 and broken == "loss":
            result = result * torch.inf
        elif step == 4:
            next(s.model.parameters()).grad[0, 0] = torch.nan
        return result, stats

    with monkeypatch.context() as patch:
        patch.setattr(loop, "forward_backward", poisoned)
        with pytest.raises(InfMoEError, match=rf"the {broken} is (inf|nan) at step 5"):
            run(small(), tmp_path / "broken")
    assert resolve_checkpoint(tmp_path / "broken").name == "step-000004"
    # whoever mends the cause goes on from weights that never saw it
    run(small(), tmp_path / "broken", resume=True)
    assert same(weights(tmp_path / "broken"), weights(finished))


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(small, tmp_path, monkeypatch):
    save_file = session.save_file

    def full(tensors, path):
        if "step-000004" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(session, "save_file", full)
    with pytest.raises(InfMoEError, match=r"checkpoint of step 4 .* No space left on device"):
        run(small(), tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    ckpt.verify(tmp_path / "checkpoints" / "step-000002")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.dir=null", r"data\.dir is not set"),
        ("data.dir=/nowhere", "no prepared data"),
        ("model.vocab_size=100", "set model.vocab_size=300"),
        ("batch_tokens=250", r"take batch_tokens=256"),
        ("eval.windows=0", "eval.windows"),
    ],
)
def test_mistakes_surface_before_anything_is_written(override, message, small, tmp_path):
    with pytest.raises(InfMoEError, match=message):
        run(small(override), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP"])
def test_unsupported_launchers_are_refused(name, small, tmp_path, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(InfMoEError, match="launch with plain DDP"):
        run(small(), tmp_path)


def test_tensorboard(small, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(small("steps=2", "log.tensorboard=true"), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2]
    assert {"val_loss", "routing/entropy", "lr"} <= set(events.Tags()["scalars"])


def test_a_second_interrupt_does_not_wait():
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGTERM
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_training_in_a_thread(small, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(small("steps=1"), tmp_path)))
    thread.start()
    thread.join()
    assert [r.exit_code for r in results] == [0]


def test_progress_bar_on_a_terminal_and_lines_elsewhere(tmp_path):
    shown = {}
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        with Reporter(tmp_path, first_step=0, num_steps=2, batch_tokens=64, console=console) as reporter:
            reporter.step(1, 3.5)
            reporter.log(1, {"loss": 3.5, "lr": 0.1})
        shown[terminal] = console.file.getvalue()
    assert "step 1/2" in shown[True]
    assert "loss 3.5000" in shown[True]
    assert "\x1b[" in shown[True]  # the bar redraws itself
    assert shown[False].startswith("step 1/2  loss 3.5000  lr 1.00e-01")
    assert "\x1b[" not in shown[False]
