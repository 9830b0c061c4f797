"""What is written for people is run and checked: code blocks, examples, links, names, numbers."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import fake_profile
import pytest
import torch
from helpers import tiny_config
from tiny_run import documents
from typer.main import get_command

from infmoe.cli import app, main
from infmoe.data import MemorySource, TokenData, TrainBPE, prepare
from infmoe.hf import InfMoEConfig, InfMoEForCausalLM, model_cost
from infmoe.recipes import recipe
from infmoe.reproduce.page.section import MISSING
from infmoe.train.config import apply_overrides, hf_config, load_config

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
ELASTIC = (ROOT / "docs" / "elastic.md").read_text()
EVIDENCE = (ROOT / "docs" / "evidence.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_fits_its_size():
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S), ids=["layer", "model"])
def test_readme_python_runs(block, capsys):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert "Error" not in capsys.readouterr().out


def test_elastic_python_runs(tmp_path, monkeypatch, capsys):
    """Its blocks in order, as they are printed, beside a run's checkpoint and profile, its tokenizer and its data."""
    monkeypatch.chdir(tmp_path)
    data = prepare(MemorySource(documents()), "data", tokenizer=TrainBPE(300), val_fraction=0.3)
    ends = {"bos_token_id": data.eot_id, "eos_token_id": data.eot_id}
    config = tiny_config(vocab_size=data.vocab_size, max_position_embeddings=128, **ends)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = InfMoEForCausalLM(config).eval().to(device)
    checkpoint = tmp_path / "runs" / "a" / "checkpoints" / "step-000600"
    model.save_pretrained(checkpoint)
    for file in (tmp_path / "data" / "tokenizer").glob("*.json"):
        shutil.copyfile(file, checkpoint / file.name)
    fake_profile.written(tmp_path / "runs" / "a", model)
    blocks = re.findall(r"```python\n(.*?)```", ELASTIC, re.S)
    assert len(blocks) == 2
    exec(compile("\n".join(blocks), "docs/elastic.md", "exec"), {"__name__": "elastic"})
    assert capsys.readouterr().out.startswith("K=8 keep=1/4 ")  # the lowest loss of all, as all meet the budget


def commands(page: str) -> list[tuple[str, ...]]:
    """The words after `infmoe` of every such line in a page's blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", page, re.S)
    lines = [shlex.split(line, comments=True) for b in blocks for line in b.replace("\\\n", "").split("\n")]
    return [tuple(words[words.index("infmoe") + 1 :]) for words in lines if "infmoe" in words]


def parsed(words: tuple[str, ...]) -> dict[str, Any]:
    """What the command line makes of them; raises for what it does not know."""
    command = get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    return command.make_context(words[0], list(words[1:])).params


@pytest.mark.parametrize(
    ("page", "vocabularies", "runs", "count"),
    [
        (README, {"gpt2": 50257}, set(), 13),
        (ELASTIC, {"data": 2048}, {"runs/a"}, 8),  # those of the README
    ],
    ids=["README", "elastic"],
)
def test_commands_fit_together(page, vocabularies, runs, count):
    """Real options and recipes; data and runs that an earlier line made, with the tokens that the model knows.

    Args:
        vocabularies: tokens of the tokenizers and data folders that are there before.
        runs: the runs that are there before.
    """
    assert len(commands(page)) >= count
    for words in commands(page):
        given = parsed(words)
        if words[0] == "data":
            named = given["tokenizer"]
            vocabularies[str(given["out"])] = int(named[4:]) if named.startswith("bpe:") else vocabularies[named]
        elif words[0] == "train":
            config = apply_overrides(recipe(given["recipe"]), given["set_"] or [])
            assert config.model["vocab_size"] == vocabularies[str(given["data_dir"])], words
            assert given["init"] is None or given["init"] in runs, words
            config.accumulation(8 if "small/" in given["recipe"] else 1)
            runs.add(str(given["out"]))
        elif "recipe" in given:
            recipe(given["recipe"])
        elif "model_dir" in given:
            assert str(given["model_dir"]) in runs, words


def test_what_the_readme_installs_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ((constraints, extras),) = re.findall(r"^pip install -c (\S+) '\.\[([\w,]+)\]'", README, re.M)
    assert (ROOT / constraints).is_file()
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert "infmoe" in project["scripts"]
    assert "hf download openai-community/gpt2 tokenizer.json --local-dir gpt2\n" in README


def test_settings_in_the_tables_exist():
    in_tables = [
        cell.split() for cell in re.findall(r"`((?:elastic|model)\.[^`]*=[^`]*)`", ELASTIC.split("## Which")[1])
    ]
    assert len(in_tables) >= 3
    for settings in in_tables:
        apply_overrides(recipe("tiny/infinity"), settings)


@pytest.mark.parametrize(
    ("out", "measured", "init"),
    [
        ("runs/one", "infinity-keep4-5M-lr0.002-s1", None),
        ("runs/tuned", "infinity-sandwich-w0.25-tuned-1M-lr0.001-s1", "runs/one"),
        ("runs/e", "infinity-sandwich-quarter-w0.25-from0.8-5M-lr0.002-s1", None),
    ],
)
def test_the_elastic_commands_are_what_was_measured(out, measured, init):
    """All that decides the weights but the seed, the vocabulary and the attention's kernel."""
    (given,) = [parsed(words) for words in commands(ELASTIC) if str(parsed(words).get("out")) == out]
    printed = apply_overrides(recipe(given["recipe"]), given["set_"]).to_dict()
    ran = json.loads((ROOT / "results" / "reproduce" / "tiny" / "runs" / f"{measured}.json").read_text())
    assert given["init"] == init
    assert ran["run"].get("init", {}).get("arm") == (init and "infinity-keep4")
    trained = load_config(ran["config"]).to_dict()  # with what has come to a run's settings since
    for name in ("steps", "batch_tokens", "precision", "optim", "schedule", "elastic"):
        assert printed[name] == trained[name], name
    others = {"vocab_size", "attn_implementation"}
    models = [InfMoEConfig(**config["model"]).to_dict() for config in (printed, ran["config"])]
    assert {name for name in models[0] if models[0][name] != models[1].get(name)} <= others


def test_the_readme_runs_from_text_to_text(tmp_path, monkeypatch, capsys):
    """Its first commands as they are printed, but for a shorter training and fewer windows."""
    (tmp_path / "novels").mkdir()
    for number, path in enumerate(sorted((ROOT / "src").rglob("*.py"))):
        (tmp_path / "novels" / f"{number}.txt").write_text(path.read_text())
    monkeypatch.chdir(tmp_path)
    data, train, evaluate, *rest = commands(README)
    generate = next(words for words in rest if words[0] == "generate" and "--prompt" in words)
    assert (data[0], train[0], evaluate[0]) == ("data", "train", "evaluate")
    for words in (
        data,
        (*train, "--set", "steps=1", "--set", "eval.every=null"),
        (*evaluate, "--windows", "2"),
        (*generate, "--max-new-tokens", "4"),
    ):
        assert main(words) == 0, capsys.readouterr().err
    assert TokenData.open("data").vocab_size == 2048
    assert capsys.readouterr().out.splitlines()[-1].startswith("It was")


def test_checkpoints_that_pages_name_are_left_by_their_run():
    config = recipe("tiny/infinity")
    written = range(config.checkpoint.every, config.steps + 1, config.checkpoint.every)
    named = {int(step) for page in PAGES for step in re.findall(r"runs/a/checkpoints/step-(\d+)", page.read_text())}
    assert config.checkpoint.keep_last is not None
    assert named
    assert named <= set(written[-config.checkpoint.keep_last :])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_the_paper_page_names_what_exists():
    page = (ROOT / "docs" / "paper.md").read_text()
    for path in re.findall(r"`((?:tests|layers|ops|hf|recipes)/[\w/]+\.py)", page):
        root = ROOT if path.startswith("tests/") else ROOT / "src" / "infmoe"
        assert (root / path).is_file(), path
    for path, names in re.findall(r"`((?:layers|ops|hf)/[\w/]+\.py): ([\w., ]+)`", page):
        source = (ROOT / "src" / "infmoe" / path).read_text()
        for name in names.replace(".", ", ").split(", "):
            assert re.search(rf"\b{name}\b", source), f"{name} in {path}"


def test_the_parameter_table_is_what_the_code_counts():
    page = (ROOT / "docs" / "paper.md").read_text()
    rows = re.findall(
        r"^\| (small|medium) (\S+) \| [\d /]+ \| ([\d.]+) / ([\d.]+) \| ([\d.]+) / ([\d.]+) \|$", page, re.M
    )
    assert len(rows) == 8
    variants = {"dense": "dense", "Switch": "switch", "MoE": "moe", "∞-MoE": "infinity"}
    for size, name, *printed in rows:
        cost = model_cost(hf_config(recipe(f"{size}/{variants[name]}")))
        counted = (cost.active, cost.total, cost.active_with_wz, cost.total_with_wz)
        assert printed == [f"{c / 1e6:.1f}" for c in counted], f"{size} {name}"


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_run(example):
    done = subprocess.run(
        [sys.executable, str(example)], capture_output=True, text=True, timeout=240, env=_environment()
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_numbers_in_the_readme_come_from_results():
    """Every bullet under "What to expect" ends in the results file whose figures it quotes."""
    section = README.split("## What to expect")[1].split("\n## ")[0]
    bullets = re.findall(r"^- (.*)$", section, re.M)
    assert bullets
    for bullet in bullets:
        (file,) = re.findall(r"\]\((results/[^)]+\.json)\)", bullet)
        flat = _numbers(json.loads((ROOT / file).read_text()))
        text = re.sub(r"\]\([^)]*\)", "", bullet)
        for number in re.findall(r"(?<![\w./-])\d+\.\d+", text):
            decimals = len(number.split(".")[1])
            assert any(f"{abs(value):.{decimals}f}" == number for value in flat), f"{number} is not in {file}"


@pytest.mark.parametrize(
    ("page", "heading"), [("README.md", "## Findings so far"), ("docs/elastic.md", "## Which to use")]
)
def test_findings_stand_in_the_evidence(page, heading):
    section = (ROOT / page).read_text().split(heading)[1].split("\n## ")[0]
    found = re.findall(r"[-+]?\d+\.\d+ ± \d+\.\d+", section) + re.findall(r"\d+ … \d+", section)
    assert len(found) >= 5
    for number in found:
        assert number in EVIDENCE, f"{number} is not in docs/evidence.md"


def test_what_is_called_unmeasured_is_unmeasured():
    (line,) = re.findall(r"Not measured yet: (.*)", README)
    named = re.findall(r"(?:Table|Figure) \d", re.sub(r"\(those of .*?\)", "", line))
    sections = {part.split(": ")[0]: part for part in EVIDENCE.split("\n### ")[1:]}
    silent = {name for name, part in sections.items() if name.startswith(("Table", "Figure")) and MISSING in part}
    assert set(named) == silent, "README.md names the tables and figures of which something is not measured"


def _numbers(value) -> list[float]:
    if isinstance(value, dict):
        return [n for v in value.values() for n in _numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in _numbers(v)]
    # percentages and milliseconds are quoted too
    return [value, 100 * value, 1000 * value, 100 * (value - 1)] if isinstance(value, int | float) else []


def _environment() -> dict[str, str]:
    import os

    return os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
