"""Commands that measure the product and the paper: bench, reproduce, report."""

import json
from pathlib import Path
from typing import Annotated

import typer

from infmoe.cli.app import TASKS_DIR, Json, app
from infmoe.errors import InfMoEError


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="Which measurement; 'list' names them.")] = "list",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer points and rounds, for a first look.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write the result to this file or folder too, as JSON; its picture beside it."),
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option(*TASKS_DIR, help="The zero-shot tasks' files, for zero_shot.")
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
        out = out / f"{name}.json" if out.is_dir() else out
        require_writable(out.parent)
    result = run_bench(name, quick=quick, data_dir=tasks_dir)
    if not as_json:
        from infmoe.bench.common import table

        print(table(result["rows"]))
    # before anything is written, which may fail; the last line is for programs, whatever stands above it
    print(json.dumps(result), flush=True)
    if out is not None:
        from infmoe.bench.figures import PICTURES

        write_json(out, result)
        if name in PICTURES:
            PICTURES[name](result["rows"], out.with_suffix(".png"))


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="table1-3, table5, table6, figure2-4, controls, elastic, or all.")],
    scale: Annotated[str, typer.Option("--scale", help="tiny (2 cores), small or medium (the paper's).")] = "tiny",
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, max=16, help="Of every run; default: what it needs.")
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option("--arms", help="Only these, by name with commas between; with --dry-run: how each is trained."),
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
        bool, typer.Option("--smoke", help="3 steps of 1,024 tokens (65,536 with --launch) of each arm, and stop.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and their costs, and stop.")] = False,
    worker: Annotated[str | None, typer.Option("--worker", hidden=True)] = None,
) -> None:
    """Train what a table or figure of the paper needs, skip what is done, and show it beside the paper's."""
    from infmoe.reproduce.command import Request, run_request

    request = Request(
        name, scale, seeds, corpus, data_dir, out, work, jobs, hours, launch, smoke, dry_run, worker, tasks, arms
    )
    raise typer.Exit(run_request(request))


@app.command()
def report(
    results: Annotated[Path, typer.Option("--results", help="The folder with `reproduce/`.")] = Path("results"),
    page: Annotated[Path, typer.Option("--page", help="The page to write.")] = Path("docs/evidence.md"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail where the page differs.")] = False,
) -> None:
    """Write the page of evidence from the results on disk."""
    from infmoe.reproduce.page.report import write_report

    same = write_report(results, page, check=check)
    if check and not same:
        raise InfMoEError(f"{page} is not what the results say: run `infmoe report`")
    print(f"{page}: {'up to date' if same else 'written'}")
