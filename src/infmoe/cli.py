"""The command line: one function per command, heavy imports inside, so that `--help` is instant."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from infmoe.errors import InfMoEError

app = typer.Typer(
    name="infmoe",
    help="∞-MoE language models: a continuum of experts, and the compute per token chosen at inference.",
    pretty_exceptions_enable=False,
    add_completion=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
ModelDir = Annotated[Path, typer.Argument(metavar="DIR", help="A run folder, a checkpoint or a saved model.")]
DataOption = Annotated[Path | None, typer.Option("--data", help="Prepared data; default: what the run was trained on.")]
SamplesOption = Annotated[
    str | None, typer.Option("--num-samples", metavar="K,..", help="Expert samples per token, e.g. 1,2,4.")
]
KeepOption = Annotated[
    str | None, typer.Option("--keep-ratio", metavar="R,..", help="Neurons kept per sample, e.g. 1/16,0.25.")
]
ExpertsOption = Annotated[
    str | None,
    typer.Option("--num-experts-per-tok", metavar="k,..", help="Experts per token of a discrete MoE."),
]
ModeOption = Annotated[
    str | None,
    typer.Option("--mode", help="sample, mu (z = mu, deterministic), antithetic or qmc; default: the model's."),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of the routing noise.")]
WindowsOption = Annotated[int, typer.Option("--windows", min=2, help="Held-out windows of the model's context.")]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Windows per forward pass.")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a mistake that the user can mend ends in one line on stderr.

    Args:
        argv: the words after `infmoe`; None: this process's own.

    Returns:
        The exit code: 0, 1 where the reader of the output has gone, 2 for a mistake, 3 where training diverged,
        130 after Ctrl-C.
    """
    # our own lines say what matters; transformers reads this when it is first imported
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        command = typer.main.get_command(app)
        with command.make_context("infmoe", words) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as done:
        return done.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # else Python would complain when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        message = _mendable(error)
        if message is None:
            raise
        print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
        return error.exit_code if isinstance(error, InfMoEError) else 2
    return 0


def _mendable(error: Exception) -> str | None:
    """What to tell the user about a mistake of theirs, or of their machine's; None: it is ours."""
    if isinstance(error, InfMoEError):
        return str(error)
    if isinstance(error, OSError):
        where = "" if error.filename is None else f"{error.filename}: "
        return where + (error.strerror or str(error).partition("\n")[0])
    if hasattr(error, "format_message"):  # a word on the command line that typer does not know
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context is not None else ""
        return error.format_message().rstrip(".") + hint
    if type(error).__module__.startswith("huggingface_hub"):
        # transformers' strict configs wrap what a check raised
        return str(error.__cause__ or error).strip().splitlines()[-1].strip()
    return None


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where everything goes.")] = Path("runs/demo"),
    again: Annotated[bool, typer.Option("--again", help="Train anew, in place of the run that is there.")] = False,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Optimizer steps; default: 250.")] = None,
) -> None:
    """Train a small ∞-MoE model on Python's own source, sweep its dials, and write a report."""
    from infmoe.demo import run_demo

    run_demo(out, again=again, steps=steps)


@app.command()
def data(
    source: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="'stdlib', files, folders or globs, or 'hub:NAME'."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    tokenizer: Annotated[
        str,
        typer.Option("--tokenizer", help="'bpe:N' trains one of N tokens; or a tokenizer.json or folder."),
    ] = "bpe:4096",
    val_fraction: Annotated[float, typer.Option("--val-fraction", help="Share of documents held out.")] = 0.01,
    text_field: Annotated[str, typer.Option("--text-field", help="Field of jsonl, parquet and Hub records.")] = "text",
    subset: Annotated[str | None, typer.Option("--subset", help="Configuration of a Hub dataset.")] = None,
    split: Annotated[str, typer.Option("--split", help="Split of a Hub dataset.")] = "train",
    shard_tokens: Annotated[int, typer.Option("--shard-tokens", min=1, help="Tokens per shard.")] = 100_000_000,
    as_json: Json = False,
) -> None:
    """Tokenize a corpus into shards, with a manifest."""
    from infmoe.data import parse_source, prepare
    from infmoe.progress import data_progress

    parsed = parse_source(source, subset=subset, split=split, text_field=text_field)
    with data_progress(quiet=as_json) as progress:
        made = prepare(
            parsed,
            out,
            tokenizer=tokenizer,
            val_fraction=val_fraction,
            shard_tokens=shard_tokens,
            progress=progress,
        )
    counts = {
        name: {"documents": info.documents, "tokens": info.tokens, "text_bytes": info.text_bytes}
        for name, info in made.manifest.splits.items()
    }
    if as_json:
        print(json.dumps({"out": str(out), "vocab_size": made.vocab_size, "splits": counts}))
        return
    for name, count in counts.items():
        print(f"{name:<6}{count['documents']:>10,} documents {count['tokens']:>15,} tokens")
    print(f"vocabulary {made.vocab_size:,}; in {out}")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe, e.g. tiny/infinity; `infmoe recipes` lists them.")],
    out: Annotated[Path | None, typer.Option("--out", help="The run's folder.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. optim.lr=1e-3."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data", help="Prepared data (the same as --set data.dir=).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved run and its costs, and stop.")] = False,
) -> None:
    """Train a model; under torchrun or `accelerate launch` on several processes."""
    from infmoe import train as training
    from infmoe.recipes import recipe as recipe_named

    settings = list(set_ or ())
    if data_dir is not None:
        settings.append(f"data.dir={data_dir}")
    config = training.apply_overrides(recipe_named(recipe), settings)
    if dry_run:
        print(training.dry_run(config))
        return
    if out is None:
        raise InfMoEError("give --out DIR, the folder for the run")
    result = training.run(config, out, resume=resume)
    raise typer.Exit(result.exit_code)


@app.command()
def recipes() -> None:
    """List the recipes."""
    from infmoe.recipes import describe_variant, recipe_names

    for name in recipe_names():
        print(f"{name:<28}{describe_variant(name)}")


@app.command()
def params(
    recipe: Annotated[str, typer.Argument(help="A recipe, e.g. small/infinity.")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")] = None,
    as_json: Json = False,
) -> None:
    """Count a recipe's parameters and FLOPs, in the paper's accounting and in full."""
    from infmoe.hf import model_cost
    from infmoe.recipes import recipe as recipe_named
    from infmoe.train import apply_overrides
    from infmoe.train.config import hf_config

    counts = model_cost(hf_config(apply_overrides(recipe_named(recipe), set_ or ()))).as_dict()
    if as_json:
        print(json.dumps({"recipe": recipe} | counts))
        return
    notes = {
        "total": "parameters, the paper's accounting (no W_z, no discrete router)",
        "active": "used per token, the paper's accounting (K*r of the FFN)",
        "total_with_wz": "every parameter",
        "active_with_wz": "the paper's active, W_z and discrete router added",
        "active_union": "used per token, counted by the union of independent masks",
        "flops_executed": "forward, per token, what runs now",
        "flops_ideal": "forward, per token, if only the union ran",
        "bytes_executed": "weights read for one token at batch 1, float32",
        "bytes_ideal": "the same if only the union were read",
        "ffn_flops_router": "of these, FFN routing: router maps and W_z z",
    }
    for name, note in notes.items():
        print(f"{name:<18}{counts[name]:>15,}  {note}")


@app.command()
def generate(
    model_dir: ModelDir,
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue.")] = "",
    num_samples: Annotated[int | None, typer.Option("--num-samples", help="Expert samples per token (K).")] = None,
    keep_ratio: Annotated[str | None, typer.Option("--keep-ratio", help="Neurons kept per sample, e.g. 1/4.")] = None,
    num_experts_per_tok: Annotated[
        int | None, typer.Option("--num-experts-per-tok", help="k of a discrete MoE.")
    ] = None,
    mode: ModeOption = None,
    latency_budget_ms: Annotated[
        float | None, typer.Option("--latency-budget-ms", help="Choose the dials: lowest loss within this per token.")
    ] = None,
    max_loss_increase: Annotated[
        float | None, typer.Option("--max-loss-increase", help="Choose the dials: quickest that loses at most this.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option("--profile", help="What `infmoe frontier` wrote; default: frontier.json in DIR.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", help="Default: 100, or what fits.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Draw from this many likeliest tokens.")] = 50,
    seed: Annotated[int, typer.Option("--seed", help="Of the routing noise and of the drawing of tokens.")] = 0,
) -> None:
    """Continue a prompt, token by token."""
    from infmoe.eval.dials import grid, parse_mode, parse_ratios
    from infmoe.eval.generation import generate_text
    from infmoe.eval.loading import open_model
    from infmoe.hf.budget import pick

    opened = open_model(model_dir)
    dials = {
        "--num-samples": num_samples,
        "--keep-ratio": keep_ratio,
        "--num-experts-per-tok": num_experts_per_tok,
        "--mode": mode,
    }
    budget = {"latency_budget_ms": latency_budget_ms, "max_loss_increase": max_loss_increase}
    if any(value is not None for value in budget.values()):
        for option, value in dials.items():
            if value is not None:
                raise InfMoEError(f"a budget chooses the dials itself: leave {option} out")
        choice = pick(opened.model, profile or model_dir, batch_size=1, **budget)
        print(choice.reason, file=sys.stderr)
        point = choice.point
    else:
        if profile is not None:
            raise InfMoEError("--profile goes with --latency-budget-ms or --max-loss-increase")
        points = grid(
            opened.model.config,
            num_samples=None if num_samples is None else (num_samples,),
            keep_ratios=parse_ratios(keep_ratio, "--keep-ratio"),
            num_experts_per_tok=None if num_experts_per_tok is None else (num_experts_per_tok,),
            mode=parse_mode(mode),
        )
        if len(points) > 1:
            raise InfMoEError(f"--keep-ratio takes one value here, got {keep_ratio!r}")
        point = points[0]
    generate_text(
        opened.model,
        opened.tokenizer(),
        prompt,
        point,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        stream_to=sys.stdout,
    )


@app.command()
def evaluate(
    model_dir: ModelDir,
    data_dir: DataOption = None,
    num_samples: SamplesOption = None,
    keep_ratio: KeepOption = None,
    num_experts_per_tok: ExpertsOption = None,
    mode: ModeOption = None,
    windows: Annotated[
        int | None, typer.Option("--windows", min=2, help="Held-out windows of the model's context; default: 256.")
    ] = None,
    batch_size: BatchOption = 16,
    seed: SeedOption = 0,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="Zero-shot tasks: 'paper', or lm-eval's names: arc_easy,boolq.")
    ] = None,
    task_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="The tasks' local files; default: the Hugging Face Hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=2, help="The first N items of each task.")] = None,
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
                    f"{option} is for the held-out loss: leave it out of --tasks (--data-dir has their files)"
                )
        from infmoe.eval.zero_shot import run as zero_shot
        from infmoe.eval.zero_shot import show

        if out is not None:
            from infmoe.provenance import require_writable

            require_writable(out)
        settings = zero_shot.Settings(
            tasks, task_dir, limit, tuple(range(seed, seed + (seeds or 1))), batch_size, per_item
        )
        scored = zero_shot.evaluate_tasks(
            model_dir,
            settings,
            num_samples=num_samples,
            keep_ratio=keep_ratio,
            num_experts_per_tok=num_experts_per_tok,
            mode=mode,
            out=out,
            say=lambda line: print(line, file=sys.stderr),
            show=lambda result: print(json.dumps(result) if as_json else show.table(result), flush=True),
        )
        if out is not None:
            picture = show.plot(scored, out / show.PICTURE)
            if not as_json:
                print(f"\npicture: {picture}\nfigures: {out / zero_shot.RESULTS}")
        return
    only = {"--data-dir": task_dir, "--limit": limit, "--seeds": seeds, "--per-item": per_item, "--out": out}
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
        quiet=as_json,
    )
    _show(result, as_json)


@app.command()
def sweep(
    model_dir: ModelDir,
    data_dir: DataOption = None,
    num_samples: SamplesOption = None,
    keep_ratio: KeepOption = None,
    num_experts_per_tok: ExpertsOption = None,
    mode: ModeOption = None,
    windows: WindowsOption = 128,
    batch_size: BatchOption = 16,
    rounds: Annotated[int, typer.Option("--rounds", min=4, help="Timing rounds, all points interleaved.")] = 40,
    seed: SeedOption = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for sweep.json and sweep.png.")] = None,
    as_json: Json = False,
) -> None:
    """Loss against latency and FLOPs over a grid of the dials; table, picture and JSON."""
    from infmoe.eval.plots import plot_sweep
    from infmoe.eval.sweep import sweep_checkpoint
    from infmoe.provenance import write_json

    out = out or model_dir
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
        out=out,
        quiet=as_json,
    )
    write_json(out / "sweep.json", result)
    picture = plot_sweep(result["points"], out / "sweep.png", title=f"{model_dir}: one checkpoint, its dials")
    _show(result, as_json)
    if not as_json:
        print(f"\npicture: {picture}\nfigures: {out / 'sweep.json'}")


@app.command()
def frontier(
    model_dir: ModelDir,
    data_dir: DataOption = None,
    num_samples: SamplesOption = None,
    keep_ratio: KeepOption = None,
    num_experts_per_tok: ExpertsOption = None,
    mode: ModeOption = None,
    schedules: Annotated[
        int, typer.Option("--schedules", min=0, help="Settings that differ from layer to layer, at most.")
    ] = 4,
    windows: WindowsOption = 128,
    batch_size: BatchOption = 16,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Sequences that are generated at once.")] = 1,
    prompt_length: Annotated[
        int | None, typer.Option("--prompt-length", min=1, help="Cached tokens before the first timed one.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="Timing turns of each point.")] = 12,
    budgets: Annotated[
        int, typer.Option("--budgets", min=0, help="Then generate under so many budgets and say how often each is met.")
    ] = 0,
    seed: SeedOption = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the profile; default: DIR.")] = None,
    as_json: Json = False,
) -> None:
    """Measure loss and time per token over the dials on this machine; `generate` chooses by it."""
    from infmoe.eval.frontier import PICTURE, measure_frontier
    from infmoe.eval.plots import plot_frontier
    from infmoe.hf.budget import PROFILE
    from infmoe.provenance import write_json

    out = out or model_dir
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
        out=out,
        quiet=as_json,
    )
    write_json(out / PROFILE, result)
    picture = plot_frontier(result, out / PICTURE, title=f"{model_dir}: what a token's time buys")
    _show(result, as_json)
    if not as_json:
        print(f"• on the frontier: no other setting is quicker and better\npicture: {picture}")
        for row in result.get("budgets", ()):
            regret = "-" if row["regret"] is None else f"{row['regret']:+.4f}"
            print(
                f"budget {row['budget_ms']:.2f} ms: met by {row['met']:.1%} of {row['steps']} tokens with "
                f"{row['picked']}; regret {regret} nats"
            )
        where = "" if out == model_dir else f" --profile {out}"
        example = f"infmoe generate {model_dir} --latency-budget-ms {_example(result)}{where}"
        print(f"profile: {out / PROFILE}; e.g. `{example}`")


def _example(result: dict[str, Any]) -> str:
    """A budget that some settings meet and others do not."""
    times = sorted(row["token_ms_p95"] for row in result["points"])
    return f"{times[len(times) // 2]:.2g}"


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="Which measurement; 'list' names them.")] = "list",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer points and rounds, for a first look.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the result to this JSON file too, its picture beside it.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print how backends are chosen here, and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Measure the product itself: layer, decoding, training, loop, start-up, exact resumption, tokenizing."""
    from infmoe.bench import BENCHES, run_bench
    from infmoe.provenance import require_writable, write_json

    if explain:
        from infmoe.ops.dispatch import explain as explain_dispatch

        print(explain_dispatch())
        return
    if name == "list":
        for known, (_, _, text) in BENCHES.items():
            print(f"{known:<12}{text}")
        return
    if out is not None:
        require_writable(out.parent)
    result = run_bench(name, quick=quick)
    if not as_json:
        from infmoe.bench.common import table

        print(table(result["rows"]))
    if out is not None:
        from infmoe.bench.figures import PICTURES

        write_json(out, result)
        if name in PICTURES:
            PICTURES[name](result["rows"], out.with_suffix(".png"))
    print(json.dumps(result))  # the last line is for programs, whatever stands above it


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="table1-3, table5, table6, figure2-4, controls, or all.")],
    scale: Annotated[str, typer.Option("--scale", help="tiny (2 cores), small or medium (the paper's).")] = "tiny",
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, max=16, help="Of every run; default: what it needs.")
    ] = None,
    corpus: Annotated[
        str | None, typer.Option("--corpus", help="Text files to train on; held out are whole files.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option("--data", help="Prepared data instead of a corpus.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Where results go.")] = Path("results/reproduce"),
    work: Annotated[Path, typer.Option("--work", help="For what is unfinished, and for models.")] = Path(
        "runs/reproduce"
    ),
    tasks: Annotated[
        Path | None,
        typer.Option("--tasks-dir", help="Score the models on the zero-shot tasks whose files lie in this folder too."),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs side by side; each gets its share of cores.")] = 1,
    hours: Annotated[float | None, typer.Option("--hours", help="Stop then; a run in progress goes on later.")] = None,
    launch: Annotated[
        str | None, typer.Option("--launch", help="What starts a training run, e.g. 'accelerate launch -m infmoe'.")
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="3 steps of 1,024 tokens of each run, all else unchanged, and stop.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and their costs, and stop.")] = False,
    worker: Annotated[str | None, typer.Option("--worker", hidden=True)] = None,
) -> None:
    """Train what a table or figure of the paper needs, skip what is done, and show it beside the paper's."""
    from infmoe.reproduce.command import Request, run_request

    request = Request(
        name, scale, seeds, corpus, data_dir, out, work, jobs, hours, launch, smoke, dry_run, worker, tasks
    )
    raise typer.Exit(run_request(request))


@app.command()
def report(
    results: Annotated[Path, typer.Option("--results", help="The folder with `reproduce/`.")] = Path("results"),
    page: Annotated[Path, typer.Option("--page", help="The page to write.")] = Path("docs/evidence.md"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail where the page differs.")] = False,
) -> None:
    """Write the page of evidence from the results on disk."""
    from infmoe.reproduce.report import write_report

    same = write_report(results, page, check=check)
    if check and not same:
        raise InfMoEError(f"{page} is not what the results say: run `infmoe report`")
    print(f"{page}: {'up to date' if same else 'written'}")


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    from rich.console import Console
    from rich.table import Table

    from infmoe.eval.report import table_cells

    titles, cells = table_cells(result["points"])
    console = Console(highlight=False)
    # a pipe gets whole lines; on a narrow terminal titles are broken at spaces, and no figure ever is
    columns = [[title, *(row[i] for row in cells)] for i, title in enumerate(titles)]
    if console.is_terminal and _width(columns) > console.width:
        columns = [[title.replace(" ", "\n"), *column] for title, *column in columns]
    console.width = max(console.width, _width(columns))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, (title, *_) in enumerate(columns):
        table.add_column(title, justify="right" if i else "left")
    for row in cells:
        table.add_row(*row)
    console.print(table)
    print(
        f"* reference of Δ; {result['windows']} windows of {result['window']} tokens, split 'val' of "
        f"{result['data']};\nloss in nats per token; union: share of the FFN that a token uses; "
        "MFLOPs per token, forward"
    )


def _width(columns: Sequence[Sequence[str]]) -> int:
    """Characters of a table of these columns, two between any two."""
    return sum(max(len(line) for cell in column for line in cell.split("\n")) + 2 for column in columns)
