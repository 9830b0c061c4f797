"""Commands that make models: demo, data, train, recipes, params."""

import json
from pathlib import Path
from typing import Annotated

import typer

from infmoe.cli.app import Json, app
from infmoe.errors import InfMoEError


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
        typer.Argument(metavar="SOURCE...", help="Files, folders or globs; or 'stdlib' or 'hub:NAME' alone."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    tokenizer: Annotated[
        str,
        typer.Option("--tokenizer", help="'bpe:N' trains one of N tokens (tiny: 2048); or a tokenizer.json or folder."),
    ] = "bpe:2048",
    val_fraction: Annotated[float, typer.Option("--val-fraction", help="Share of documents held out.")] = 0.01,
    text_field: Annotated[
        str | None, typer.Option("--text-field", help="Field of jsonl, parquet and Hub records; default: text.")
    ] = None,
    subset: Annotated[str | None, typer.Option("--subset", help="Configuration of a Hub dataset.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="Split of a Hub dataset; default: train.")] = None,
    max_documents: Annotated[
        int | None, typer.Option("--max-documents", min=1, help="Stop after so many records of a Hub dataset.")
    ] = None,
    shard_tokens: Annotated[int, typer.Option("--shard-tokens", min=1, help="Tokens per shard.")] = 100_000_000,
    as_json: Json = False,
) -> None:
    """Tokenize a corpus into shards, with a manifest."""
    from infmoe.data import parse_source, prepare
    from infmoe.progress import data_progress

    parsed = parse_source(source, subset=subset, split=split, text_field=text_field, max_documents=max_documents)
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
    init: Annotated[
        str | None,
        typer.Option("--init", metavar="DIR", help="Start from a trained model's weights (--set init=)."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint, or start where there is none.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved run and its costs, and stop.")] = False,
) -> None:
    """Train a model; under torchrun or `accelerate launch` on several processes."""
    from infmoe import train as training
    from infmoe.recipes import recipe as recipe_named

    settings = list(set_ or ())
    if data_dir is not None:
        settings.append(f"data.dir={json.dumps(str(data_dir))}")  # quoted: a folder may be named 2026
    if init is not None:
        settings.append(f"init={json.dumps(str(Path(init).absolute()))}")  # to be the same folder when it goes on
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
        "flops_executed": "forward, per token, no masked neuron skipped; the sparse path, in decoding, runs less",
        "flops_ideal": "forward, per token, if only the union ran",
        "ffn_flops_router": "of both, FFN routing: router maps and W_z z",
        "bytes_executed": "weights read for one token at batch 1, float32, no masked neuron skipped",
        "bytes_ideal": "the same if only the union were read",
    }
    for name, note in notes.items():
        print(f"{name:<18}{counts[name]:>15,}  {note}")
