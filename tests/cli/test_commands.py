"""What each command does and prints."""

import json
import re

import numpy as np
import pytest
from tiny_run import MODEL_SETTINGS, RUN_SETTINGS, documents, settings

import infmoe.demo
from infmoe.data import StdlibSource, TokenData
from infmoe.recipes import recipe, recipe_names
from infmoe.train import apply_overrides, dry_run

COMMANDS = ("demo", "data", "train", "recipes", "params", "generate", "evaluate", "sweep", "bench")


@pytest.mark.parametrize("words", [(), ("--help",)])
def test_help_lists_every_command(cli, words):
    outcome = cli(*words)
    assert outcome.code == 0
    for command in COMMANDS:
        assert re.search(rf"\b{command} +[A-Z]\w+", outcome.out), f"{command} has no help text"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(cli, command):
    from typer.main import get_command

    from infmoe.cli import app

    assert cli(command, "--help").code == 0
    described = get_command(app).commands[command]
    assert described.help
    for parameter in described.params:
        assert getattr(parameter, "help", None), f"{command} {parameter.name} has no help text"


# Table 1 and Sec. 5, in millions: active and total
PAPER = {
    "small/dense": (124.4, 124.4),
    "small/switch": (124.4, 181.1),
    "small/moe": (124.4, 181.1),
    "small/infinity": (129.2, 185.8),
    "medium/dense": (354.8, 354.8),
    "medium/switch": (354.8, 556.2),
    "medium/moe": (354.8, 556.2),
    "medium/infinity": (367.4, 568.8),
}


@pytest.mark.parametrize("name", PAPER)
def test_params_are_the_papers(cli, name):
    outcome = cli("params", name, "--json")
    counts = json.loads(outcome.out)
    assert counts["recipe"] == name
    assert (round(counts["active"] / 1e6, 1), round(counts["total"] / 1e6, 1)) == PAPER[name]
    extra = counts["total_with_wz"] - counts["total"]
    assert extra == counts["active_with_wz"] - counts["active"]
    assert (extra > 0) == (not name.endswith("dense"))
    shown = dict(line.split()[:2] for line in cli("params", name).out.splitlines())
    for key in ("total", "active", "total_with_wz", "active_with_wz"):
        assert shown[key] == f"{counts[key]:,}"


def test_the_routers_flops_stand_below_those_that_they_are_part_of(cli):
    rows = [line.split()[0] for line in cli("params", "tiny/infinity").out.splitlines()]
    assert rows[rows.index("ffn_flops_router") - 2 :][:2] == ["flops_executed", "flops_ideal"]


def test_params_takes_settings(cli):
    narrow = json.loads(cli("params", "tiny/infinity", "--set", "model.num_samples=1", "--json").out)
    assert narrow["active"] < json.loads(cli("params", "tiny/infinity", "--json").out)["active"]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_looked_at(name):
    text = dry_run(recipe(name))
    resolved, end = json.JSONDecoder().raw_decode(text)
    assert resolved["name"] == name
    assert "parameters" in text[end:]


def test_dry_run_and_recipes(cli, tmp_path):
    outcome = cli("train", "tiny/infinity", "--dry-run", "--out", tmp_path / "run", "--set", "optim.lr=1e-3")
    assert outcome.code == 0
    assert json.JSONDecoder().raw_decode(outcome.out)[0]["optim"]["lr"] == 1e-3
    assert not (tmp_path / "run").exists()
    assert [line.split()[0] for line in cli("recipes").out.splitlines()] == recipe_names()


def test_data(cli, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, text in enumerate(documents(20)):
        (corpus / f"{number:02d}.txt").write_text(text)
    words = ("data", corpus, "--out", tmp_path / "data", "--tokenizer", "bpe:280", "--val-fraction", "0.3")
    first = cli(*words)
    assert first.code == 0
    assert first.err == ""
    data = TokenData.open(tmp_path / "data")
    assert f"{data.info('train').documents} documents" in first.out
    assert f"vocabulary {data.vocab_size}" in first.out
    second = cli(*words, "--json")  # the same again: opened as it is
    assert json.loads(second.out)["splits"]["val"]["tokens"] == data.info("val").tokens


def test_generate(cli, tiny_run):
    dials = ("--num-samples", "1", "--keep-ratio", "1/8", "--mode", "sample")
    words = ("generate", tiny_run.run, "--prompt", "abc de", *dials)
    first, same, other = (cli(*words, "--seed", seed) for seed in (3, 3, 4))
    assert first.code == 0
    assert first.err == ""
    assert first.out == same.out != other.out
    assert first.out.startswith("abc de")
    assert cli("generate", tiny_run.run, "--max-new-tokens", "5").out.strip()
    by_layer = ("generate", tiny_run.run, "--prompt", "abc de", "--mode", "sample", "--seed", "3")
    assert cli(*by_layer, "--num-samples", "1|1", "--keep-ratio", "1/8|0.125").out == first.out
    assert cli(*by_layer, "--num-samples", "4|1", "--keep-ratio", "1|1/8").out != first.out
    mu = ("generate", tiny_run.run, "--prompt", "a", "--mode", "mu", "--temperature", "0")
    assert cli(*mu, "--seed", "1").out == cli(*mu, "--seed", "2").out


def evaluated(outcome) -> dict:
    """Its JSON: one object on one line, and nothing else anywhere."""
    assert outcome.code == 0
    assert outcome.err == ""
    assert outcome.out.count("\n") == 1
    return json.loads(outcome.out)


EVALUATE = ("--windows", "8", "--num-samples", "1,4", "--keep-ratio", "0.125,1/4")


def test_evaluate_json(cli, tiny_run):
    words = ("evaluate", tiny_run.run, "--data", tiny_run.data, *EVALUATE, "--json")
    first = evaluated(cli(*words))
    assert [(p["num_samples"], p["keep_ratio"]) for p in first["points"]] == [
        (1, 0.125),
        (1, 0.25),
        (4, 0.125),
        (4, 0.25),
    ]
    for point in first["points"]:
        assert np.log(320) - 1 < point["loss"] < np.log(320) + 3
        assert 0 < point["loss_se"] < 1
        assert point["keep_ratio"] - 1e-6 <= point["union_ratio"] < 1
        assert 0 < point["entropy"] <= 1
        assert point["flops_ideal"] < point["flops_executed"]
    assert first["windows"] == 8
    assert first["window"] == 32

    def losses(*more):
        return [point["loss"] for point in evaluated(cli(*words, *more))["points"]]

    assert losses() == [point["loss"] for point in first["points"]]
    # 1e-4: batches of other sizes round differently, and a unit at the threshold may be swapped for another
    assert losses("--batch-size", "3") == pytest.approx(losses(), abs=1e-4)
    assert all(a != b for a, b in zip(losses("--seed", "1"), losses(), strict=True))


def test_evaluate_and_sweep_open_the_model_as_they_are_told(cli, tiny_run, tmp_path):
    few = ("--windows", "4", "--num-samples", "2", "--keep-ratio", "1/16", "--json")
    how = ("--device", "cpu", "--dtype", "bfloat16", "--set", "mask_scale=rms")
    sweep = ("sweep", tiny_run.run, "--rounds", "4", "--out", tmp_path)
    plain, scaled, swept = (
        evaluated(cli(*words))
        for words in (("evaluate", tiny_run.run, *few), ("evaluate", tiny_run.run, *few, *how), (*sweep, *few, *how))
    )
    assert (plain["device"], plain["dtype"], plain["overrides"]) == ("cpu", "float32", [])
    for result in (scaled, swept):
        assert (result["device"], result["dtype"], result["overrides"]) == ("cpu", "bfloat16", ["mask_scale=rms"])
        assert result["points"][0]["loss"] != plain["points"][0]["loss"]
    assert swept["points"][0]["loss"] == scaled["points"][0]["loss"]


@pytest.mark.parametrize("command", ["generate", "evaluate", "sweep", "frontier"])
def test_every_command_on_a_model_takes_its_options(cli, tiny_run, command):
    outcome = cli(command, tiny_run.run, "--set", "mask_scale=wide", "--device", "cpu", "--dtype", "bfloat16")
    assert outcome.code == 2
    assert "unknown mask_scale 'wide'" in outcome.err


def test_schedules_as_the_frontier_prints_them(cli, tiny_run, tmp_path):
    few = ("--windows", "4", "--num-samples", "2,2|1", "--keep-ratio", "1/4,1/4|1/8")
    found = evaluated(cli("evaluate", tiny_run.run, *few, "--json"))["points"]
    dials = [(2, 0.25), (2, [0.25, 0.125]), ([2, 1], 0.25), ([2, 1], [0.25, 0.125])]
    assert [(p["num_samples"], p["keep_ratio"]) for p in found] == dials
    assert len({p["loss"] for p in found}) == 4
    outcome = cli("sweep", tiny_run.run, *few, "--rounds", "4", "--out", tmp_path)
    assert [line.split("  ")[0] for line in outcome.out.splitlines()[1:5]] == [
        *("K=2 keep=1/4 *", "K=2 keep=1/4|1/8", "K=2|1 keep=1/4", "K=2|1 keep=1/4|1/8"),
    ]
    assert (tmp_path / "sweep.png").is_file()
    alone = cli("sweep", tiny_run.run, *few[:2], "--keep-ratio", "1/4|1/8", "--rounds", "4", "--out", tmp_path)
    assert alone.code == 0
    modes = ("--keep-ratio", "1/4", "--num-samples", "1", "--mode", "mu,sample")
    assert cli("sweep", tiny_run.run, *few[:2], *modes, "--rounds", "4", "--out", tmp_path).code == 0
    assert "--mode takes one mode here" in cli("frontier", tiny_run.run, *modes, "--out", tmp_path / "none").err


def test_evaluate_by_the_mean(cli, tiny_run):
    words = ("evaluate", tiny_run.run, "--windows", "8", "--keep-ratio", "1/8,1/4", "--mode", "mu", "--json")
    first, other = (evaluated(cli(*words, "--seed", seed))["points"] for seed in (0, 1))
    assert first == other
    assert [point["mode"] for point in first] == ["mu", "mu"]
    both = evaluated(cli(*words[:-3], "--mode", "sample,mu", "--json"))["points"]
    assert [(point["mode"], point["num_samples"]) for point in both] == [("sample", 2)] * 2 + [("mu", None)] * 2
    assert [point["loss"] for point in both[2:]] == [point["loss"] for point in first]
    turned = evaluated(cli(*words[:-3], "--mode", "mu, sample,mu", "--keep-ratio", "1/4,1/8", "--json"))["points"]
    (reference,) = [point for point in turned if point["is_reference"]]
    assert (reference["mode"], reference["keep_ratio"]) == ("sample", 0.25)  # the model's own, wherever it stands
    assert len(turned) == 4


def test_evaluate_table(cli, tiny_run):
    outcome = cli("evaluate", tiny_run.run, *EVALUATE)
    assert outcome.err == ""
    header, *rows = outcome.out.splitlines()
    for title in ("loss (nats)", "union", "entropy", "MFLOPs executed", "MFLOPs ideal"):
        assert title in header
    assert "decode ms" not in header
    assert [row.split("  ")[0] for row in rows[:4]] == [
        "K=1 keep=1/8 *",
        "K=1 keep=1/4",
        "K=4 keep=1/8",
        "K=4 keep=1/4",
    ]
    assert f"8 windows of 32 tokens, split 'val' of {tiny_run.data}" in outcome.out


def test_a_narrow_terminal_cuts_no_figure(cli, tiny_run, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    out = re.sub(r"\x1b\[[0-9;]*m", "", cli("evaluate", tiny_run.run, *EVALUATE).out)
    assert "executed" in out
    assert "…" not in out
    assert len(next(line for line in out.splitlines() if line.startswith("K=1 keep=1/8 *")).split()) == 12


def test_sweep(cli, tiny_run, tmp_path):
    grid = ("--num-samples", "1,2", "--keep-ratio", "1/4", "--windows", "4", "--rounds", "4")
    outcome = cli("sweep", tiny_run.run, *grid, "--out", tmp_path / "out")
    assert outcome.code == 0
    assert "decode ms" in outcome.out
    assert str(tmp_path / "out" / "sweep.png") in outcome.out
    written = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [point["num_samples"] for point in written["points"]] == [1, 2]
    assert all(point["decode_ms"] > 0 for point in written["points"])
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert evaluated(cli("sweep", tiny_run.run, *grid, "--out", tmp_path / "json", "--json"))["timing_rounds"] == 4

    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    quick = ("sweep", tiny_run.run, "--num-samples", "1", *grid[2:], "--out", tmp_path / "out", "--json")
    first, second = cli(*quick), cli(*quick)
    kept = [", ".join(str(tmp_path / "out" / f"sweep.{n}.{end}") for end in ("json", "png")) for n in (1, 2)]
    assert [first.err, second.err] == [f"kept what was there before: {names}\n" for names in kept]
    assert (tmp_path / "out" / "sweep.1.json").read_bytes() == before["sweep.json"]
    assert (tmp_path / "out" / "sweep.1.png").read_bytes() == before["sweep.png"]
    assert json.loads((tmp_path / "out" / "sweep.2.json").read_text())["points"] == json.loads(first.out)["points"]
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["points"] == json.loads(second.out)["points"]


@pytest.mark.parametrize(("variant", "count"), [("dense", 1), ("moe", 4)])
def test_sweep_of_other_variants(cli, tiny_run, tmp_path, variant, count):
    few = settings(*RUN_SETTINGS, "steps=1", "eval.every=null")
    run = tmp_path / "run"
    assert cli("train", f"tiny/{variant}", "--data", tiny_run.data, "--out", run, *few).code == 0
    points = evaluated(cli("sweep", run, "--windows", "4", "--rounds", "4", "--json"))["points"]
    assert len(points) == count
    assert [p["num_experts_per_tok"] for p in points] == ([None] if variant == "dense" else [1, 2, 3, 4])
    assert (run / "sweep.png").is_file()


def test_demo(cli, tmp_path, monkeypatch):
    """Of a handful of modules, and of a smaller model; everything else is the demo's own."""
    library = StdlibSource._files
    monkeypatch.setattr(StdlibSource, "_files", lambda self: library(self)[:60])
    small = settings(*MODEL_SETTINGS, "model.vocab_size=2048", "model.z_dim=8", "eval.windows=4")[1::2]
    monkeypatch.setattr(infmoe.demo, "recipe", lambda name: apply_overrides(recipe(name), small))
    monkeypatch.setattr(infmoe.demo, "WINDOWS", 4)
    monkeypatch.setattr(infmoe.demo, "TIMING_ROUNDS", 4)
    monkeypatch.setattr(infmoe.demo, "PROMPTS", ("def f(",))
    monkeypatch.setattr(infmoe.demo, "NEW_TOKENS", 8)
    out = tmp_path / "demo"
    first = cli("demo", "--steps", "2", "--out", out)
    assert first.code == 0
    report = out / "report" / "index.html"
    assert f"The report: {report}" in first.out
    assert "Try next" in first.out
    for command in ("generate", "evaluate", "train", "params"):
        assert re.search(rf"\n  (\S*/)?infmoe {command} ", first.out)
    page = report.read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not any(word in page for word in ("http://", "https://", "<link", "<script"))
    for part in ("K=2 keep=1/4 *", "def f(", "&quot;torch&quot;", "MFLOPs ideal"):
        assert part in page

    checkpoint = out / "run" / "checkpoints" / "step-000002" / "model.safetensors"
    made = checkpoint.stat()
    second = cli("demo", "--steps", "2", "--out", out)
    assert second.code == 0
    assert "is trained already" in second.out
    assert "step 2/2" not in second.out
    assert (checkpoint.stat().st_ino, checkpoint.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)

    sweep = out / "report" / "sweep.json"
    assert "the sweep is there already" in second.out
    for damaged in (sweep.read_text()[:100], '{"points": [{}]}'):
        sweep.write_text(damaged)
        mended = cli("demo", "--steps", "2", "--out", out)
        assert mended.code == 0
        assert "is trained already" in mended.out
        assert "the sweep is there already" not in mended.out
        assert len(json.loads(sweep.read_text())["points"]) > 4

    longer = cli("demo", "--steps", "3", "--out", out)
    assert longer.code == 2
    assert "steps" in longer.err
    assert f"infmoe demo --again --out {out}" in longer.err
    assert checkpoint.is_file()
    again = cli("demo", "--steps", "3", "--out", out, "--again")
    assert again.code == 0
    assert "step 3/3" in again.out or (out / "run" / "checkpoints" / "step-000003").is_dir()
    assert not checkpoint.exists()


def test_demo_discards_runs_only(cli, tmp_path, monkeypatch):
    library = StdlibSource._files
    monkeypatch.setattr(StdlibSource, "_files", lambda self: library(self)[:60])
    precious = tmp_path / "run" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("irreplaceable")
    outcome = cli("demo", "--again", "--out", tmp_path)
    assert outcome.code == 2
    assert "is not a run: remove it by hand" in outcome.err
    assert precious.read_text() == "irreplaceable"
