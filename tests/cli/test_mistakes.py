"""Every mistake ends in one line on stderr and exit code 2, and nothing is lost."""

import errno
import json
import shutil

import pytest
import torch
from helpers import tiny_model
from tiny_run import RUN_SETTINGS, documents, settings

from infmoe import cli as command_line
from infmoe.data import MemorySource, TrainBPE, prepare

SMALL = settings(*RUN_SETTINGS, "model.z_dim=8")


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the run, to be damaged."""
    return shutil.copytree(tiny_run.run, tmp_path / "copied-run")


@pytest.fixture
def data(tiny_run, tmp_path):
    """A copy of the data, to be damaged."""
    return shutil.copytree(tiny_run.data, tmp_path / "copied-data")


def contents(folder):
    """Every file below with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evalute"], "'evaluate'"),
        (["evaluate"], "Missing argument 'DIR'"),
        (["recipes", "--jsn"], "No such option: --jsn"),
        (["params", "small/infinty"], "unknown recipe 'small/infinty'; did you mean 'small/infinity'?"),
        (["params", "tiny/infinity", "--set", "optim.lrr=1"], "did you mean 'optim.lr'?"),
        (["params", "tiny/infinity", "--set", "lr=1"], "did you mean 'optim.lr'?"),
        (["params", "tiny/infinity", "--set", "model.keep_ration=1"], "did you mean 'keep_ratio'?"),
        (["params", "tiny/infinity", "--set", "steps"], "write it as key=value"),
        (["params", "tiny/infinity", "--set", "steps=many"], "'steps'"),
        (["params", "tiny/infinity", "--set", "optim.lr=-1"], "'optim.lr'"),
        (
            ["params", "tiny/infinity", "--set", "model.hidden_size=wide"],
            "hidden_size takes a whole number, got 'wide'",
        ),
        (["params", "tiny/infinity", "--set", "model.keep_ratio=1.5"], "keep_ratio must lie in (0, 1]"),
        (["params", "tiny/infinity", "--set", "model.keep_ratio=abc"], "takes a number, or a list of them, got 'abc'"),
        (
            ["params", "tiny/infinity", "--set", "model.num_samples=1.5"],
            "num_samples takes a whole number, or a list of them, got 1.5",
        ),
        (["params", "tiny/infinity", "--set", "model.train_wz=1"], "error: train_wz takes true or false, got 1"),
        (["params", "tiny/infinity", "--set", "model.num_samples=0"], "num_samples must be"),
        (["params", "tiny/dense", "--set", "model.num_samples=2"], "has no option 'num_samples'"),
        (["params", "tiny/infinity", "--set", "model.ffn=infinite"], "unknown ffn 'infinite'"),
        (["train", "tiny/infinity"], "give --out DIR"),
        (["train", "tiny/infinity", "--out", "x"], "data.dir is not set"),
        (["generate", "nowhere"], "nowhere is no folder"),
        (["evaluate", "nowhere"], "nowhere is no folder"),
        (["sweep", "nowhere", "--rounds", "1"], "--rounds"),
        (["data", "nowhere", "--out", "x"], "unknown source"),
        (["data", "stdlib", "--out", "x", "--tokenizer", "bpe:9"], "vocab size 9 is out of range"),
        (["data", "stdlib", "--out", "x", "--tokenizer", "gpt9"], "unknown tokenizer 'gpt9'"),
        (["data", "stdlib", "--out", "x", "--val-fraction", "1.5"], "val fraction 1.5"),
        (["data", "stdlib", "--out", "x", "--max-documents", "9"], "max documents 9 is for a dataset of the Hub"),
        (["bench", "speed"], "speed"),
    ],
)
def test_words(mistake, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in mistake(*words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep-ratio", "0"], "error: --keep-ratio must lie in (0, 1]"),
        (["--keep-ratio=1/4,1.01"], "error: --keep-ratio must lie in (0, 1]"),
        (["--keep-ratio", "quarter"], "--keep-ratio takes numbers"),
        (["--num-samples", "0"], "error: --num-samples must be"),
        (["--num-samples", "1,-2"], "error: --num-samples must be"),
        (["--num-samples", "1,two"], "--num-samples takes integers"),
        (["--mode", "sampel"], "unknown mode 'sampel'; did you mean 'sample'?"),
        (["--mode", "mu", "--num-samples", "2"], "leave --num-samples out"),
        (["--num-experts-per-tok", "1"], "has no dial 'num_experts_per_tok'"),
        (["--seed", "-1"], "seed"),
        (["--windows", "1"], "--windows"),
        (["--batch-size", "0"], "--batch-size"),
    ],
)
def test_dials(mistake, tiny_run, words, message):
    assert message in mistake("evaluate", tiny_run.run, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep-ratio", "2"], "error: --keep-ratio must lie in (0, 1]"),
        (["--keep-ratio", "1/4,1/2"], "--keep-ratio takes one value"),
        (["--num-samples", "0"], "error: --num-samples must be"),
        (["--num-samples", "few"], "--num-samples"),
        (["--num-samples", "2", "--mode", "mu"], "leave --num-samples out"),
        (["--mode", "median"], "unknown mode 'median'"),
        (["--max-new-tokens", "33"], "error: --max-new-tokens must lie in 1 .. 31"),
        (["--max-new-tokens", "0"], "error: --max-new-tokens must lie in 1 .. 31"),
        (["--prompt", "word " * 40], "shorten it to 31"),
        (["--temperature", "-1"], "temperature must be 0 or more"),
        (["--seed", "-3"], "seed"),
    ],
)
def test_generation(mistake, tiny_run, words, message):
    assert message in mistake("generate", tiny_run.run, *words)


@pytest.mark.parametrize(
    ("ffn", "words"),
    [
        ("dense", ["--num-samples", "2"]),
        ("dense", ["--keep-ratio", "0.5"]),
        ("switch", ["--num-experts-per-tok", "1"]),
        ("moe", ["--num-samples", "2"]),
        ("moe", ["--mode", "mu"]),
    ],
)
def test_dials_that_a_variant_does_not_have(mistake, tiny_run, tmp_path, ffn, words):
    tiny_model(ffn, vocab_size=300).save_pretrained(tmp_path)
    shutil.copy(tiny_run.checkpoint / "tokenizer.json", tmp_path)
    for command in (["generate"], ["evaluate", "--data", tiny_run.data]):
        assert f"ffn='{ffn}' has no dial" in mistake(*command, tmp_path, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-experts-per-tok", "17"], "error: --num-experts-per-tok 17 is more than the layer's 4 experts: use"),
        (["--set", "rank_damping=abc"], ": rank_damping takes a number, got 'abc'"),
        (["--keep-ratio", "0.5"], "has no dial 'keep_ratio'"),
    ],
)
def test_options_are_named_as_they_are_given(mistake, tiny_run, tmp_path, words, message):
    tiny_model("moe", vocab_size=300).save_pretrained(tmp_path)
    shutil.copy(tiny_run.checkpoint / "tokenizer.json", tmp_path)
    for command in (["generate", tmp_path], ["evaluate", tmp_path, "--data", tiny_run.data]):
        assert message in mistake(*command, *words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "the corpus is empty"),
        (b"ab\0cd", "is binary (NUL at byte 2)"),
        (b"caf\xe9", "is not UTF-8 at byte 3"),
        (b"one document only", "split is empty"),
    ],
)
def test_corpus(mistake, tmp_path, text, message):
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(text)
    line = mistake("data", corpus, "--out", tmp_path / "data", "--tokenizer", "bpe:260", "--val-fraction", "0.5")
    assert message in line
    assert list(tmp_path.iterdir()) == [corpus]


def test_data_folder_of_something_else(mistake, tiny_run, data, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("text")
    before = contents(data)
    assert "holds another dataset" in mistake("data", corpus, "--out", data)
    assert contents(data) == before


def test_fewer_tokens_than_a_batch(mistake, tmp_path):
    prepare(MemorySource(documents(1)), tmp_path / "data", tokenizer=TrainBPE(260), val_fraction=0)
    words = ("train", "tiny/infinity", "--data", tmp_path / "data", "--out", tmp_path / "run")
    line = mistake(*words, *SMALL, "--set", "eval.every=null", "--set", "model.max_position_embeddings=1024")
    assert "are needed" in line
    assert not (tmp_path / "run").exists()
    # enough for a window, not for the batch's rows
    line = mistake(*words, *SMALL, "--set", "eval.every=null", "--set", "batch_tokens=8192")
    assert "are needed" in line
    assert not (tmp_path / "run").exists()


def test_weights_to_start_from(mistake, tiny_run, tmp_path):
    train = ("train", "tiny/infinity", "--data", tiny_run.data, "--out", tmp_path / "run", *SMALL)
    assert "2026 is no folder: give a run folder" in mistake(*train, "--init", "2026")
    assert "holds no checkpoint" in mistake(*train, "--init", _without_checkpoints(tmp_path))
    other = mistake(*train, "--set", "model.z_dim=4", "--init", tiny_run.run)
    assert "do not fit this run's model: --set model.z_dim=8" in other
    assert "2026 is no folder" in mistake(*train, "--init", "2026", "--dry-run")
    assert not (tmp_path / "run").exists()


def _without_checkpoints(folder):
    (folder / "begun" / "checkpoints").mkdir(parents=True)
    return folder / "begun"


def test_token_files(mistake, tiny_run, data, tmp_path):
    shard = next(data.glob("val-*.bin"))
    whole = shard.read_bytes()
    train = ("train", "tiny/infinity", "--data", data, "--out", tmp_path / "run", *SMALL)
    for damaged, message in (
        (whole[:-2], "is truncated"),
        (whole[:-2] + b"\0\0", "was changed: its SHA-256"),
        (b"\0" * 1024 + whole[1024:], "does not start with the header"),
    ):
        shard.write_bytes(damaged)
        assert message in mistake("evaluate", tiny_run.run, "--data", data)
        assert message in mistake(*train)
    shard.unlink()
    assert "cannot read" in mistake(*train)
    (data / "manifest.json").write_text("{")
    assert "is not a manifest" in mistake(*train)
    assert not (tmp_path / "run").exists()


def test_data_without_a_validation_split(mistake, tiny_run, tmp_path):
    prepare(
        MemorySource(documents()),
        tmp_path / "data",
        tokenizer=str(tiny_run.checkpoint),
        val_fraction=0,
    )
    for command in ("evaluate", "sweep", "frontier"):
        line = mistake(command, tiny_run.run, "--data", tmp_path / "data")
        assert "has no val split: give other --data, prepared with a --val-fraction above 0" in line
    words = ("train", "tiny/infinity", "--data", tmp_path / "data", "--out", tmp_path / "run", *SMALL)
    line = mistake(*words)
    assert "has no val split: train without evaluation (--set eval.every=null), or on data prepared with a" in line
    assert not (tmp_path / "run").exists()


def test_vocabularies(mistake, tiny_run, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert "holds no tokenizer.json" in mistake("generate", tmp_path)
    assert "has 300 tokens, the model 61" in mistake("evaluate", tmp_path, "--data", tiny_run.data)
    words = ("train", "tiny/infinity", "--data", tiny_run.data, "--out", tmp_path / "run", *SMALL)
    assert "set model.vocab_size=300" in mistake(*words, "--set", "model.vocab_size=299")
    assert not (tmp_path / "run").exists()


def test_checkpoints(mistake, run, tmp_path):
    newest = run / "checkpoints" / "step-000004"
    weights = newest / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert "model.safetensors is damaged" in mistake("evaluate", newest)
    weights.unlink()
    assert "model.safetensors is missing" in mistake("generate", newest)
    (tmp_path / "empty").mkdir()
    assert "it is no model" in mistake("evaluate", tmp_path / "empty")
    config = json.loads((newest / "config.json").read_text())
    (tmp_path / "empty" / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert "holds a 'llama' model" in mistake("sweep", tmp_path / "empty")


def test_a_run_without_a_whole_checkpoint(cli, run):
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "model.safetensors").unlink()
    outcome = cli("evaluate", run)
    assert outcome.code == 2
    assert outcome.out == ""
    *skipped, last = outcome.err.splitlines()
    assert [line.split(":")[0] for line in skipped] == ["skipping step-000004", "skipping step-000002"]
    assert last.startswith("error: ")
    assert "holds no checkpoint that verifies" in last


def test_json_stays_json_though_a_checkpoint_is_damaged(cli, run):
    (run / "checkpoints" / "step-000004" / "model.safetensors").unlink()
    outcome = cli("evaluate", run, "--windows", "2", "--json")
    assert json.loads(outcome.out)["checkpoint"].endswith("step-000002")
    assert "skipping step-000004" in outcome.err


def test_another_runs_folder(mistake, tiny_run, run):
    before = contents(run)
    words = ("train", "tiny/infinity", "--data", tiny_run.data, "--out", run, *SMALL)
    assert "holds a finished run" in mistake(*words)
    assert "other values of optim.lr" in mistake(*words, "--set", "optim.lr=1e-5", "--resume")
    assert contents(run) == before


def test_a_model_that_cannot_be_built_leaves_no_folder(mistake, tiny_run, tmp_path):
    words = ("train", "tiny/infinity", "--data", tiny_run.data, "--out", tmp_path / "run", *SMALL)
    assert "keep_ratio must lie in" in mistake(*words, "--set", "model.keep_ratio=3")
    assert "unknown hidden_act" in mistake(*words, "--set", "model.hidden_act=foo")
    assert not (tmp_path / "run").exists()


def test_unwritable_folders(mistake, tiny_run, tmp_path):
    """A file where a folder should be stops even root."""
    (tmp_path / "file").write_text("precious")
    out = tmp_path / "file" / "out"
    train = ("train", "tiny/infinity", "--data", tiny_run.data, "--out", out, *SMALL)
    assert "cannot write to" in mistake(*train)
    assert "cannot write to" in mistake("data", "stdlib", "--out", out, "--tokenizer", "bpe:300")
    assert "cannot write to" in mistake("sweep", tiny_run.run, "--out", out)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x/sweep.json"), "/x/sweep.json: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("one thing\nand another"), "one thing"),
    ],
)
def test_what_the_system_refuses(mistake, monkeypatch, error, line):
    def fail(*_):
        raise error

    monkeypatch.setattr("infmoe.recipes.recipe_names", fail)
    assert mistake("recipes") == f"error: {line}"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["evaluate", "--batch-size", "64"], "give a smaller --batch-size or --dtype bfloat16 or --device cpu"),
        (["generate"], "give --dtype bfloat16 or --device cpu"),
        (["budgets"], "give fewer --rows or --dtype bfloat16 or --device cpu"),
    ],
)
def test_a_full_device(mistake, tiny_run, monkeypatch, words, named):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr("infmoe.checkpoint.latest", full)
    assert mistake(words[0], tiny_run.run, *words[1:]) == f"error: the device's memory is full: {named}"
    monkeypatch.setattr("infmoe.recipes.recipe_names", full)
    assert mistake("recipes") == "error: the device's memory is full: take one with more"


def test_a_full_disk_under_a_sweep(mistake, tiny_run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "sweep.json"))

    monkeypatch.setattr("infmoe.provenance.write_json", full)
    words = ("--windows", "2", "--rounds", "4", "--num-samples", "1", "--keep-ratio", "1")
    assert "sweep.json: No space left" in mistake("sweep", tiny_run.run, *words, "--out", tmp_path)


def test_interruption(cli, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("infmoe.recipes.recipe_names", interrupt)
    outcome = cli("recipes")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "interrupted\n")


def test_our_own_bugs_keep_their_traceback(monkeypatch):
    def bug():
        raise ZeroDivisionError

    monkeypatch.setattr("infmoe.recipes.recipe_names", bug)
    with pytest.raises(ZeroDivisionError):
        command_line.main(["recipes"])
