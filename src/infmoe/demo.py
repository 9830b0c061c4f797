"""The demo: from a fresh machine to a trained model, its two dials and a report, in a few minutes."""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from infmoe.data import prepare
from infmoe.errors import InfMoEError
from infmoe.progress import data_progress
from infmoe.provenance import provenance, write_json
from infmoe.recipes import recipe
from infmoe.train import apply_overrides, run

VOCAB_SIZE = 2048
STEPS = 250  # about a million tokens; results/demo/demo.json has what it takes
VAL_FRACTION = 0.05
WINDOWS = 64  # held-out windows per point of the sweep
TIMING_ROUNDS = 20
NEW_TOKENS = 90
_DRAWN = {"loss", "delta_se", "is_reference", "flops_ideal", "num_samples", "keep_ratio", "decode_ms"}
PROMPTS = (
    "def read_lines(path):\n    ",
    "class Counter:\n    def __init__(self",
)


def run_demo(out: Path, *, again: bool = False, steps: int | None = None) -> Path:
    """Make data, train `tiny/infinity`, sweep its dials, write the report.

    A finished run is not trained again; one that was stopped goes on.

    Args:
        out: folder for `data`, `run` and `report`.
        again: discard the run that is there and train anew.
        steps: optimizer steps; None: `STEPS`.

    Returns:
        The report's page.

    Raises:
        InfMoEError: `out` holds a run of another length or recipe.
        SystemExit: training was stopped by a signal (its exit code).
    """
    from infmoe.eval.generation import generate_text
    from infmoe.eval.loading import open_model
    from infmoe.eval.plots import plot_sweep, plot_training
    from infmoe.eval.report import read_metrics, write_report
    from infmoe.eval.sweep import sweep_checkpoint
    from infmoe.layers.point import Point

    begin = time.perf_counter()
    _say(f"1/4  tokenizing Python's standard library ({out / 'data'})")
    with data_progress() as progress:
        data = prepare(
            "stdlib",
            out / "data",
            tokenizer=f"bpe:{VOCAB_SIZE}",
            val_fraction=VAL_FRACTION,
            progress=progress,
        )
    _say(f"     {data.info('train').tokens:,} training tokens, {data.info('val').tokens:,} held out")

    run_dir = out / "run"
    settings = [f"data.dir={out / 'data'}", f"steps={steps or STEPS}"]
    config = apply_overrides(recipe("tiny/infinity"), settings)
    report = out / "report"
    if again and run_dir.exists():
        _discard_run(run_dir)
    there = run_dir.exists()
    finished = (run_dir / "checkpoints" / f"step-{config.steps:06d}").is_dir()
    tokens = f"{config.steps * config.batch_tokens:,} tokens"
    if finished:
        _say(f"2/4  {run_dir} is trained already, on {tokens}: nothing to do (--again trains anew)")
    else:
        _say(f"2/4  training tiny/infinity, {tokens} ({run_dir})")
        (report / "sweep.json").unlink(missing_ok=True)  # of the model before
    try:
        result = run(config, run_dir, resume=there)
    except InfMoEError as error:
        hint = f"; `infmoe demo --again --out {out}` trains anew" if there else ""
        raise InfMoEError(f"{error}{hint}") from error
    if result.exit_code:
        _say("     the same command goes on from there")
        raise SystemExit(result.exit_code)

    sweep = _sweep_there(report / "sweep.json") if finished else None
    if sweep is not None:
        _say(f"3/4  the sweep is there already ({report / 'sweep.json'})")
    else:
        _say("3/4  sweeping K and the keep ratio, all from the one checkpoint")
        sweep = sweep_checkpoint(
            run_dir,
            data_dir=None,
            num_samples=None,
            keep_ratio=None,
            num_experts_per_tok=None,
            mode=None,
            windows=WINDOWS,
            batch_size=16,
            seed=0,
            rounds=TIMING_ROUNDS,
            full_grid=True,
        )
        write_json(report / "sweep.json", sweep)
    _say("4/4  generating text and writing the report")
    opened = open_model(run_dir)
    tokenizer = opened.tokenizer()
    samples = [
        (
            f"{point.label()}, temperature 0.8, seed 0",
            generate_text(opened.model, tokenizer, prompt, point, max_new_tokens=NEW_TOKENS),
        )
        for prompt in PROMPTS
        for point in (Point(2, 0.25), Point(1, 0.125))
    ]
    metrics = read_metrics(run_dir)
    pictures = [
        (
            plot_sweep(sweep["points"], report / "sweep.png", title="One checkpoint, two dials"),
            "Held-out loss against what a token costs, for every K (lines) and keep ratio (points).",
        ),
        (
            plot_training(metrics, report / "training.png", title="Training tiny/infinity"),
            "Loss, and what the router does, over the training tokens.",
        ),
    ]
    page = write_report(
        report / "index.html",
        title="∞-MoE demo",
        introduction=(
            f"A {config.model['num_hidden_layers']}-layer ∞-MoE language model of width "
            f"{config.model['hidden_size']}, trained on {config.steps * config.batch_tokens:,} tokens of the Python "
            f"standard library's source with K = {opened.model.config.num_samples} samples per token, each keeping "
            f"{opened.model.config.keep_ratio:.0%} of the neurons, then run at other settings of both dials."
        ),
        pictures=pictures,
        rows=sweep["points"],
        samples=samples,
        provenance=provenance(),
    )
    seconds = time.perf_counter() - begin
    write_json(report / "demo.json", {"seconds": seconds, "trained": not finished, "provenance": provenance()})
    _say(f"\nDone in {seconds:.0f} s. The report: {page}")
    command = "infmoe" if shutil.which("infmoe") else str(Path(os.path.relpath(sys.executable)).parent / "infmoe")
    _say(
        "\nTry next:\n"
        f'  {command} generate {run_dir} --prompt "import os" --num-samples 1 --keep-ratio 1/8\n'
        f"  {command} evaluate {run_dir} --num-samples 1,4 --keep-ratio 1/16,1/4 --json\n"
        f"  {command} train tiny/dense-swiglu --data {out / 'data'} --out runs/dense-swiglu\n"
        f"  {command} params small/infinity"
    )
    return page


def _sweep_there(path: Path) -> dict[str, Any] | None:
    """What an earlier demo measured; None: nothing, or nothing that can be read, so that it is measured anew."""
    try:
        sweep = json.loads(path.read_text())
        rows = sweep["points"]
        whole = all(row.keys() >= _DRAWN for row in rows) and any(row["is_reference"] for row in rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return sweep if whole else None


def _discard_run(run_dir: Path) -> None:
    """Remove a run folder, and nothing that is not one."""
    if not (run_dir / "run.json").is_file():
        raise InfMoEError(f"{run_dir} is not a run: remove it by hand, or give another --out")
    shutil.rmtree(run_dir)


def _say(line: str) -> None:
    print(line, file=sys.stdout, flush=True)
