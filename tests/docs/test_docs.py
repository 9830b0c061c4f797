"""What is written for people is run and checked: code blocks, examples, links, names, numbers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from infmoe.hf import model_cost
from infmoe.recipes import recipe, recipe_names
from infmoe.train.config import hf_config

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_fits_its_size():
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S), ids=["layer", "model"])
def test_readme_python_runs(block, capsys):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert "Error" not in capsys.readouterr().out


def test_readme_commands_exist():
    from typer.main import get_command

    from infmoe.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    used = re.findall(r"^(?:torchrun .*-m )?infmoe (\w+)(.*)$", README, re.M)
    assert len(used) >= 6
    for name, rest in used:
        options = {o for p in commands[name].params for o in p.opts}
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in options, f"infmoe {name} {option}"
        for named in re.findall(r"\b(?:tiny|small|medium)/[a-z0-9-]+", rest):
            assert named in recipe_names()


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


def test_findings_in_the_readme_stand_in_the_evidence():
    section = README.split("## Findings so far")[1].split("\n## ")[0]
    evidence = (ROOT / "docs" / "evidence.md").read_text()
    found = re.findall(r"[-+]\d+\.\d+ ± \d+\.\d+", section)
    assert len(found) >= 5
    for number in found:
        assert number in evidence, f"{number} is not in docs/evidence.md"


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
