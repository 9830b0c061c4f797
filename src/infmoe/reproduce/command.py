"""`infmoe reproduce`: from the words of a command line to a table and a picture."""

import json
import math
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infmoe.data.manifest import Manifest
from infmoe.errors import InfMoEError, unknown_name
from infmoe.hf import model_cost
from infmoe.hf.accounting import ModelCost
from infmoe.locks import LOCKS
from infmoe.progress import data_progress
from infmoe.provenance import provenance, require_writable, write_json
from infmoe.reproduce.arms import arm_named
from infmoe.reproduce.plan import EXPERIMENTS, TUNING_SEED, Group, RunSpec, Scale, groups, scale_named, tokens_text
from infmoe.reproduce.store import Store
from infmoe.train.config import hf_config

VAL_FRACTION = 0.06
_SMOKE = ("steps=3", "micro_batch_size=1", "eval.every=null", "log.every=1")
_SMOKE_TOKENS, _SMOKE_LAUNCHED_TOKENS = 2**10, 2**16  # a step's; the second has rows for many processes


@dataclass(frozen=True)
class Request:
    """What the command line says; see `infmoe reproduce --help`."""

    name: str
    scale: str = "tiny"
    seeds: int | None = None
    corpus: str | None = None
    data: Path | None = None
    out: Path = Path("results/reproduce")
    work: Path = Path("runs/reproduce")
    jobs: int = 1
    hours: float | None = None
    launch: str | None = None
    smoke: bool = False
    dry_run: bool = False
    worker: str | None = None  # one of several: the label of the command that started them
    tasks: Path | None = None
    arms: str | None = None

    @property
    def label(self) -> str:
        """The command that results name: without this machine's paths."""
        if self.worker is not None:
            return self.worker
        source = "--corpus FILES" if self.corpus is not None else "--data DIR"
        tasks = " --tasks-dir DIR" if self.tasks is not None else ""
        seeds = "" if self.seeds is None else f" --seeds {self.seeds}"
        arms = "" if self.arms is None else f" --arms {','.join(self.arm_names)}"
        return f"infmoe reproduce {self.name} --scale {self.scale}{seeds}{arms} {source}{tasks}"

    @property
    def arm_names(self) -> list[str]:
        """What `--arms` names."""
        return [name.strip() for name in (self.arms or "").split(",")]

    def worker_words(self, data: Path) -> list[str]:
        """The command of one of several workers; it renders nothing."""
        words = ["reproduce", self.name, "--scale", self.scale, "--data", str(data), "--out", str(self.out)]
        words += ["--work", str(self.work), "--worker", self.label]
        options = {"--seeds": self.seeds, "--hours": self.hours, "--launch": self.launch, "--tasks-dir": self.tasks}
        options |= {"--arms": self.arms}
        for option, value in options.items():
            words += [option, str(value)] if value is not None else []
        return words


def run_request(request: Request) -> int:
    """Do what is asked for.

    Returns:
        The exit code: 0, or that of the first worker that failed.

    Raises:
        InfMoEError: an unknown name or scale, no data, a damaged result, or a training run that failed.
        SystemExit: a signal stopped it (its exit code).
    """
    launch_words(request)
    if request.hours is not None and not 0 < request.hours < math.inf:
        raise InfMoEError(f"--hours {request.hours:g} is no time to stop after: give a number above 0, or leave it out")
    scale = scale_named(request.scale)
    wanted = groups(request.name, scale, request.seeds)
    if request.arms is not None:
        if not any(group.arms for group in wanted):
            raise InfMoEError(f"{request.name} trains no arms: leave --arms out")
        wanted = only(wanted, request.arm_names)
    store = Store(request.out, scale)
    if request.dry_run:
        print(describe_plan(store, wanted))
        if request.arms is not None:
            print(describe_arms(store, wanted))
        return 0
    if request.tasks is not None:
        from infmoe.eval.zero_shot.files import read_tasks

        read_tasks(request.tasks)  # what is missing or damaged is better known before hours of training
    if wanted:
        require_writable(request.out)
        require_writable(request.work)
        data = _data(request, scale)
        if request.worker is None and (note := repeats(data, wanted)) is not None:
            print(note, file=sys.stderr)
        if request.smoke:
            smoke(request, store, wanted, data)
            return 0
        code = _work(request, store, wanted, data)
        if code or request.worker is not None:
            return code
    for name in EXPERIMENTS if request.name == "all" else (request.name,):
        _render(store, name)
    return 0


def only(wanted: list[Group], arms: list[str]) -> list[Group]:
    """The groups with these arms alone.

    Raises:
        InfMoEError: an arm that none of them has.
    """
    known = list(dict.fromkeys(name for group in wanted for name in group.arms))
    for name in arms:
        if name not in known:
            raise unknown_name("arm", name, known)
    narrowed = [replace(group, only=tuple(name for name in group.arms if name in arms)) for group in wanted]
    return [group for group in narrowed if group.only]


def repeats(data: Path, wanted: list[Group]) -> str | None:
    """A line that says so where runs read the data more than once; they go on, with another order in each epoch."""
    tokens = Manifest.read(data).splits["train"].tokens
    longest = max(group.tokens for group in wanted)
    if longest <= tokens:
        return None
    return (
        f"note: the longest runs train on {tokens_text(longest)} tokens, {data} has {tokens:,}: they read it "
        f"{longest / tokens:.1f} times, where the paper reads its data once; give more data for that"
    )


def _subset(scale: Scale) -> str:
    """Of FineWeb's samples the smallest that is long enough for every run of a scale, but for what is held out.

    Not for those that are wanted now alone: all runs of a scale are trained on the same data.
    """
    longest = max(group.tokens for group in groups("all", scale))
    return "sample-10BT" if longest < 9.5e9 else "sample-100BT" if longest < 9.5e10 else "sample-350BT"


def _data(request: Request, scale: Scale) -> Path:
    """The prepared data, made from the corpus where there is one."""
    if (request.corpus is None) == (request.data is None):
        raise InfMoEError(
            "give --corpus FILES to train on, or --data DIR, a folder made by `infmoe data`; one of the two"
        )
    if request.data is not None:
        return request.data
    if scale.vocab is None:
        raise InfMoEError(
            f"scale {scale.name!r} trains on prepared data: give --data DIR, made by "
            f"`infmoe data hub:HuggingFaceFW/fineweb --subset {_subset(scale)} --tokenizer FOLDER --out DIR` "
            "with GPT-2's tokenizer"
        )
    from infmoe.data import parse_source, prepare

    assert request.corpus is not None
    folder = request.work / scale.name / "data"
    with data_progress() as progress:
        prepare(
            parse_source(request.corpus),
            folder,
            tokenizer=f"bpe:{scale.vocab}",
            val_fraction=VAL_FRACTION,
            progress=progress,
        )
    return folder


def _work(request: Request, store: Store, wanted: list[Group], data: Path) -> int:
    """Train and measure what is missing; the exit code."""
    from infmoe.reproduce.work import Workshop, work_through
    from infmoe.reproduce.work_folder import WorkFolder
    from infmoe.reproduce.workers import start_workers

    if request.jobs > 1:
        if not LOCKS:
            raise InfMoEError("this system has no file locks to keep workers off each other's runs: leave --jobs out")
        return start_workers(request.worker_words(data), request.jobs)
    shop = Workshop(
        store=store,
        work=WorkFolder(request.work / store.scale.name),
        data=data,
        launch=tuple(launch_words(request)),
        label=request.label,
        deadline=None if request.hours is None else time.monotonic() + 3600 * request.hours,
        say=lambda line: print(line, flush=True),
        tasks=request.tasks,
    )
    if not work_through(shop, wanted):
        print("time is up; the same command goes on from here", flush=True)
    return 0


def launch_words(request: Request) -> list[str]:
    """What starts a training run.

    Raises:
        InfMoEError: `--launch` is no command.
    """
    if request.launch is None:
        return [sys.executable, "-m", "infmoe"]
    try:
        words = shlex.split(request.launch)
    except ValueError as error:
        raise InfMoEError(
            f"--launch {request.launch!r} is no command ({error}): give it as a shell takes it"
        ) from error
    if not words:
        raise InfMoEError("--launch is empty: name what starts a training run, or leave it out")
    return words


def _render(store: Store, name: str) -> None:
    """Print one table, and write it beside its picture."""
    from infmoe.reproduce.page.report import render_section, write_section

    section = render_section(name, store)
    path = write_section(store, name, section)
    print(f"\n{section.title}\n\n{section.body}\n")
    print("\n".join([f"table: {path}", *(f"picture: {picture}" for _, picture in section.pictures)]))


def describe_plan(store: Store, wanted: list[Group]) -> str:
    """Every run that is wanted, what it costs, and whether it is done; the last line adds up."""
    lines, runs, tokens, flops = [], Counter[bool](), Counter[bool](), Counter[bool]()
    costs: dict[str, ModelCost] = {}  # many runs share a model
    for spec in all_specs(store, wanted):
        config = spec.config()
        key = json.dumps(config.model)
        if key not in costs:
            costs[key] = model_cost(hf_config(config))
        cost = costs[key]
        done = store.get(spec) is not None
        length = config.steps * config.batch_tokens
        own = 3 * config.mean_passes * cost.flops_executed * length
        runs[done] += 1
        tokens[done] += length
        flops[done] += round(own)
        lines.append(
            f"{spec.slug:<46}{spec.recipe:<28}{config.steps:>8,} steps {cost.total_with_wz / 1e6:>8.1f}M "
            f"{own:>9.2e} FLOPs  {'done' if done else 'to do'}"
        )
    whole = _amount(runs.total(), tokens.total(), flops.total())
    lines.append(f"in all {whole}; to do {_amount(runs[False], tokens[False], flops[False])}")
    return "\n".join(lines)


def _amount(runs: int, tokens: int, flops: int) -> str:
    return f"{runs:,} runs, {tokens_text(tokens)} tokens, {flops:.2e} FLOPs of training"


def describe_arms(store: Store, wanted: list[Group]) -> str:
    """The command that trains each arm by itself, at each length."""
    lines = []
    for spec in all_specs(store, wanted):
        if spec.seed == TUNING_SEED + 1:
            out = f"runs/{spec.arm.name}-{tokens_text(spec.tokens)}"
            base = spec.arm.init
            start = [] if base is None else ["--init", f"runs/{base}-{tokens_text(spec.scale.tokens)}"]
            words = ["infmoe", "train", spec.recipe, "--data", "DIR", "--out", out, *start, *spec.words()]
            lines.append(shlex.join(words))
    return "\n".join(lines)


def all_specs(store: Store, wanted: list[Group]) -> list[RunSpec]:
    """Every run, tuning included; a learning rate that is not known yet is the recipe's."""
    specs: dict[str, RunSpec] = {}
    for group in wanted:
        arms = [arm_named(name) for name in group.trained]
        found = [spec for arm in arms for spec in store.tuning(arm)]
        for seed in range(1, 1 + store.seeds_wanted(group)):
            for arm in arms:
                base = RunSpec(store.scale, arm, group.tokens, 0.0, seed)
                lr = store.lr(arm)
                found.append(RunSpec(store.scale, arm, group.tokens, _recipe_lr(base) if lr is None else lr, seed))
        specs |= {spec.slug: spec for spec in found}
    return list(specs.values())


def _recipe_lr(spec: RunSpec) -> float:
    from infmoe.recipes import recipe

    return recipe(spec.recipe).optim.lr * spec.arm.lr_factor


def smoke_settings(request: Request) -> list[str]:
    """What three steps have in place of the run's own settings.

    A launcher may start several processes, nobody here knows how many, and each needs rows of its own.
    """
    return [*_SMOKE, f"batch_tokens={_SMOKE_TOKENS if request.launch is None else _SMOKE_LAUNCHED_TOKENS}"]


def smoke(request: Request, store: Store, wanted: list[Group], data: Path) -> None:
    """Three steps of each arm at full width, of a few rows each and without validation; all else is the run's own.

    But for the weights of those that start from a trained model: they are drawn, for there may be no model yet.
    """
    rows: list[dict[str, Any]] = []
    arms = {spec.arm.name: spec for spec in all_specs(store, wanted) if spec.seed}
    for spec in arms.values():
        folder = request.work / store.scale.name / f"smoke-{spec.arm.name}"
        shutil.rmtree(folder, ignore_errors=True)
        command = [*launch_words(request), "train", spec.recipe, "--out", str(folder), "--data", str(data)]
        command += [*spec.words(), *(word for setting in smoke_settings(request) for word in ("--set", setting))]
        begin = time.monotonic()
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise InfMoEError(f"{spec.slug}: three steps failed: {lines[-1] if lines else done.returncode}")
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line) for line in lines]
        rows.append(
            {
                "arm": spec.arm.name,
                "tokens_of_the_run": tokens_text(spec.tokens),
                "losses": [record["loss"] for record in metrics if "loss" in record],
                "tokens_per_sec": [record["tokens_per_sec"] for record in metrics if "loss" in record],
                "seconds": round(time.monotonic() - begin, 1),
            }
        )
        shutil.rmtree(folder)
        print(json.dumps(rows[-1]), flush=True)
        record = {
            "name": request.name,
            "rows": rows,
            "provenance": provenance() | {"command": request.label + " --smoke"},
        }
        write_json(store.folder / f"smoke-{request.name}.json", record)
