"""Commands that run a model: generate, evaluate, sweep, frontier, budgets."""

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from infmoe.cli.app import (
    TASKS_DIR,
    BatchOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    ExpertsOption,
    Json,
    KeepOption,
    ModelDir,
    ModeOption,
    ModesOption,
    SamplesOption,
    SeedOption,
    SetOption,
    WindowsOption,
    app,
)
from infmoe.cli.tables import show_budgets, show_points
from infmoe.errors import InfMoEError

ProfileOption = Annotated[
    Path | None, typer.Option("--profile", help="What `infmoe frontier` wrote; default: in DIR, or its run.")
]
RowsOption = Annotated[int, typer.Option("--rows", min=1, help="Sequences that are generated at once.")]


@app.command()
def generate(
    model_dir: ModelDir,
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue.")] = "",
    num_samples: Annotated[
        str | None, typer.Option("--num-samples", metavar="K", help="Expert samples per token.")
    ] = None,
    keep_ratio: Annotated[
        str | None,
        typer.Option(
            "--keep-ratio", metavar="R", help="Neurons kept per sample, e.g. 1/4; one for each layer: '1/4|1/8|...'."
        ),
    ] = None,
    num_experts_per_tok: Annotated[
        str | None, typer.Option("--num-experts-per-tok", metavar="k", help="Of a discrete MoE; by layer: '4|2|...'.")
    ] = None,
    mode: ModeOption = None,
    latency_budget_ms: Annotated[
        float | None,
        typer.Option(
            "--latency-budget-ms", help="Choose the dials: lowest loss within this for every token but the first."
        ),
    ] = None,
    max_loss_increase: Annotated[
        float | None, typer.Option("--max-loss-increase", help="Choose the dials: quickest that loses at most this.")
    ] = None,
    profile: ProfileOption = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", help="Default: 100, or what fits.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Draw from this many likeliest tokens.")] = 50,
    seed: Annotated[int, typer.Option("--seed", help="Of the routing noise and of the drawing of tokens.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    set_: SetOption = None,
) -> None:
    """Continue a prompt, token by token."""
    from infmoe.eval.dials import grid, parse_ints, parse_mode, parse_ratios, parse_setting
    from infmoe.eval.generation import generate_text, request
    from infmoe.eval.loading import open_model
    from infmoe.hf.budget import pick
    from infmoe.hf.clock import TokenClock

    opened = open_model(model_dir, device, dtype, set_ or ())
    tokenizer = opened.tokenizer()
    dials = {
        "--num-samples": num_samples,
        "--keep-ratio": keep_ratio,
        "--num-experts-per-tok": num_experts_per_tok,
        "--mode": mode,
    }
    budget = {"latency_budget_ms": latency_budget_ms, "max_loss_increase": max_loss_increase}
    choice, clock = None, TokenClock()
    if any(value is not None for value in budget.values()):
        for option, value in dials.items():
            if value is not None:
                raise InfMoEError(f"a budget chooses the dials itself: leave {option} out")
        if latency_budget_ms is not None:
            opened.model.refuse_untimed((), {})  # what the checkpoint's generation config may ask for
        ids, new_tokens = request(opened.model, tokenizer, prompt, max_new_tokens)
        choice = pick(opened.model, profile, rows=1, positions=len(ids) + new_tokens, **budget)
        print(choice.reason, file=sys.stderr)
        point = choice.point
    else:
        if profile is not None:
            raise InfMoEError("--profile goes with --latency-budget-ms or --max-loss-increase")
        (point,) = grid(
            opened.model.config,
            num_samples=parse_setting(num_samples, "--num-samples", parse_ints),
            keep_ratios=parse_setting(keep_ratio, "--keep-ratio", parse_ratios),
            num_experts_per_tok=parse_setting(num_experts_per_tok, "--num-experts-per-tok", parse_ints),
            mode=parse_mode(mode),
        )
    generate_text(
        opened.model,
        tokenizer,
        prompt,
        point,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        stream_to=sys.stdout,
        clock=clock if latency_budget_ms is not None else None,
    )
    if choice is not None and latency_budget_ms is not None:
        choice = choice.timed(clock.milliseconds(), latency_budget_ms)
        if choice.met is not None:
            met = f"{choice.met:.0%} of {len(choice.token_ms)} tokens met the budget"
            print(choice.missed(latency_budget_ms) or met, file=sys.stderr)


@app.command()
def evaluate(
    model_dir: ModelDir,
    data_dir: DataOption = None,
    num_samples: SamplesOption = None,
    keep_ratio: KeepOption = None,
    num_experts_per_tok: ExpertsOption = None,
    mode: ModesOption = None,
    windows: Annotated[
        int | None, typer.Option("--windows", min=2, help="Held-out windows of the model's context; default: 256.")
    ] = None,
    batch_size: BatchOption = 16,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    set_: SetOption = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="Zero-shot tasks: 'paper', or lm-eval's names: arc_easy,boolq.")
    ] = None,
    task_dir: Annotated[
        Path | None, typer.Option(*TASKS_DIR, help="The tasks' local files; default: the Hugging Face Hub.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=2, help="N items of each task, the same ones for every model.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Score the tasks with this many seeds; default: 1.")
    ] = None,
    per_item: Annotated[
        Path | None, typer.Option("--per-item", help="Write each item's log-likelihoods to this file.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the tasks' JSON and picture.")] = None,
    as_json: Json = False,
) -> None:
    """Held-out loss at each setting of the dials, with standard error and routing figures; or zero-shot tasks."""
    if tasks is not None:
        for option, value in (("--data", data_dir), ("--windows", windows)):
            if value is not None:
                raise InfMoEError(
                    f"{option} is for the held-out loss: leave it out of --tasks (--tasks-dir has their files)"
                )
        from infmoe.eval.zero_shot import run as zero_shot
        from infmoe.eval.zero_shot import show

        if out is not None:
            from infmoe.provenance import require_writable

            require_writable(out)
        settings = zero_shot.Settings(
            tasks, task_dir, limit, tuple(range(seed, seed + (seeds or 1))), batch_size, per_item
        )

        def present(result: dict[str, Any]) -> None:
            print(json.dumps(result) if as_json else show.table(result), flush=True)
            if out is not None and show.finished(result):
                picture = show.plot(result, out / show.PICTURE)
                if not as_json:
                    print(f"\npicture: {picture}\nfigures: {out / zero_shot.RESULTS}", flush=True)

        zero_shot.evaluate_tasks(
            model_dir,
            settings,
            num_samples=num_samples,
            keep_ratio=keep_ratio,
            num_experts_per_tok=num_experts_per_tok,
            mode=mode,
            device=device,
            dtype=dtype,
            overrides=set_ or (),
            out=out,
            say=lambda line: print(line, file=sys.stderr),
            show=present,
        )
        return
    only = {"--tasks-dir": task_dir, "--limit": limit, "--seeds": seeds, "--per-item": per_item, "--out": out}
    for option, value in only.items():
        if value is not None:
            raise InfMoEError(f"{option} goes with --tasks: add --tasks paper, or leave it out")
    from infmoe.eval.sweep import sweep_checkpoint

    result = sweep_checkpoint(
        model_dir,
        data_dir=data_dir,
        num_samples=num_samples,
        keep_ratio=keep_ratio,
        num_experts_per_tok=num_experts_per_tok,
        mode=mode,
        windows=windows or 256,
        batch_size=batch_size,
        seed=seed,
        device=device,
        dtype=dtype,
        overrides=set_ or (),
        quiet=as_json,
    )
    show_points(result, as_json)


@app.command()
def sweep(
    model_dir: ModelDir,
    data_dir: DataOption = None,
    num_samples: SamplesOption = None,
    keep_ratio: KeepOption = None,
    num_experts_per_tok: ExpertsOption = None,
    mode: ModesOption = None,
    windows: WindowsOption = 128,
    batch_size: BatchOption = 16,
    rounds: Annotated[int, typer.Option("--rounds", min=4, help="Timing rounds, all points interleaved.")] = 40,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    set_: SetOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="For sweep.json and sweep.png; default: DIR, or its run.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Loss against latency and FLOPs over a grid of the dials; table, picture and JSON."""
    from infmoe.checkpoint import results_folder
    from infmoe.eval.plots import plot_sweep
    from infmoe.eval.sweep import sweep_checkpoint
    from infmoe.provenance import set_aside, write_json

    out = out or results_folder(model_dir)
    result = sweep_checkpoint(
        model_dir,
        data_dir=data_dir,
        num_samples=num_samples,
        keep_ratio=keep_ratio,
        num_experts_per_tok=num_experts_per_tok,
        mode=mode,
        windows=windows,
        batch_size=batch_size,
        seed=seed,
        rounds=rounds,
        full_grid=True,
        device=device,
        dtype=dtype,
        overrides=set_ or (),
        out=out,
        quiet=as_json,
    )
    figures, picture = out / "sweep.json", out / "sweep.png"
    set_aside(figures, picture)
    write_json(figures, result)
    plot_sweep(result["points"], picture, title=f"{model_dir}: one checkpoint, its dials")
    show_points(result, as_json)
    if not as_json:
        print(f"\npicture: {picture}\nfigures: {figures}")


@app.command()
def frontier(
    model_dir: ModelDir,
    data_dir: DataOption = None,
    num_samples: SamplesOption = None,
    keep_ratio: KeepOption = None,
    num_experts_per_tok: ExpertsOption = None,
    mode: ModeOption = None,
    schedules: Annotated[
        int,
        typer.Option(
            "--schedules",
            min=0,
            help="Settings that differ from layer to layer, found by a search, at most; 0: none of any kind.",
        ),
    ] = 4,
    windows: WindowsOption = 128,
    batch_size: BatchOption = 16,
    rows: RowsOption = 1,
    prompt_length: Annotated[
        int | None, typer.Option("--prompt-length", min=1, help="Cached tokens before the first timed one.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="Timing turns of each point.")] = 12,
    budgets: Annotated[
        int, typer.Option("--budgets", min=0, help="Then generate under so many budgets and say how often each is met.")
    ] = 0,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the profile; default: DIR, or its run.")] = None,
    as_json: Json = False,
) -> None:
    """Measure loss and time per token over the dials on this machine; `generate` chooses by it."""
    from infmoe.checkpoint import results_folder, write_text
    from infmoe.eval.frontier import measure_frontier
    from infmoe.eval.generation import DEFAULT_NEW_TOKENS
    from infmoe.eval.plots import plot_frontier
    from infmoe.eval.report import markdown_points
    from infmoe.hf.budget import REACH, profile_name
    from infmoe.layers.point import Point
    from infmoe.provenance import set_aside, write_json

    place = out or results_folder(model_dir)
    profile = place / profile_name(rows)
    table, picture = profile.with_suffix(".md"), profile.with_suffix(".png")

    def save(result: dict[str, Any]) -> None:
        set_aside(profile, table, picture)
        write_json(profile, result)
        note = "MFLOPs per token, forward; • quicker than all that are better; * the reference of Δ"
        write_text(table, f"{markdown_points(result['points'])}\n\n{note}\n")
        plot_frontier(result, picture, title=f"{model_dir}: what a token's time buys")

    result = measure_frontier(
        model_dir,
        data_dir=data_dir,
        num_samples=num_samples,
        keep_ratio=keep_ratio,
        num_experts_per_tok=num_experts_per_tok,
        mode=mode,
        num_schedules=schedules,
        windows=windows,
        batch_size=batch_size,
        rows=rows,
        prompt_length=prompt_length,
        rounds=rounds,
        budgets=budgets,
        seed=seed,
        device=device,
        dtype=dtype,
        overrides=set_ or (),
        out=place,
        only_own=out is None,
        quiet=as_json,
        save=save,
    )
    if budgets:
        write_json(profile, result)
    show_points(result, as_json)
    if not as_json:
        print("• on the frontier: no other setting is quicker and better")
        print(f"picture: {picture}\ntable: {table}")
        show_budgets(result.get("budgets", ()))
        if all(Point.of(row) == Point() for row in result["points"]):
            print(f"profile: {profile}, of the one setting that there is")
            return
        if rows > 1:
            print(f"profile: {profile}, for `model.generate` with {rows} prompts at once")
            return
        words = ["infmoe", "generate", str(model_dir), "--latency-budget-ms", _example(result)]
        for option, value in (("--device", device), ("--dtype", dtype), ("--profile", out)):
            words += [] if value is None else [option, str(value)]
        words += [word for override in set_ or () for word in ("--set", override)]
        told = REACH * result["cached_tokens"][1]  # positions that the profile says something about
        if told < min(1 + DEFAULT_NEW_TOKENS, result["window"]):
            words += ["--max-new-tokens", str(told - 1)]
        print(f"profile: {profile}; e.g. `{shlex.join(words)}`")


@app.command()
def budgets(
    model_dir: ModelDir,
    profile: ProfileOption = None,
    count: Annotated[
        int, typer.Option("--count", min=2, help="Budgets, evenly spread from the quickest setting to the slowest.")
    ] = 10,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Tokens that are timed under each, at least.")] = 200,
    rows: RowsOption = 1,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for budgets.json; default: the profile's.")] = None,
    as_json: Json = False,
) -> None:
    """Generate under latency budgets of the profile that is there: does it still hold?"""
    from infmoe.eval.budgets import budgets_name, try_budgets
    from infmoe.provenance import write_json

    result = try_budgets(
        model_dir,
        profile=profile,
        count=count,
        steps=steps,
        rows=rows,
        device=device,
        dtype=dtype,
        overrides=set_ or (),
        out=out,
        quiet=as_json,
    )
    path = (out or Path(result["profile"]).parent) / budgets_name(rows)
    write_json(path, result)
    if as_json:
        print(json.dumps(result))
        return
    show_budgets(result["budgets"])
    print(f"figures: {path}; profile: {result['profile']} of {result['profile_time'] or 'unknown date'}")


def _example(result: dict[str, Any]) -> str:
    """A budget that some settings meet and others do not."""
    times = sorted(row["token_ms_p95"] for row in result["points"])
    return f"{math.ceil(10 * times[len(times) // 2]) / 10:g}"
