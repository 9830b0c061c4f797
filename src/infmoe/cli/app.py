"""The application that the commands register with, and the options that several of them share."""

from pathlib import Path
from typing import Annotated

import typer

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
    str | None,
    typer.Option(
        "--keep-ratio",
        metavar="R,..",
        help="Neurons kept per sample, e.g. 1/16,0.25; one for each layer: '1/4|1/8|...'.",
    ),
]
ExpertsOption = Annotated[
    str | None,
    typer.Option(
        "--num-experts-per-tok", metavar="k,..", help="Experts per token of a discrete MoE; by layer: '4|2|...'."
    ),
]
ModeOption = Annotated[
    str | None,
    typer.Option("--mode", help="sample, mu (z = mu, deterministic), antithetic or qmc; default: the model's."),
]
ModesOption = Annotated[
    str | None,
    typer.Option(
        "--mode",
        metavar="MODE,..",
        help="sample, mu (z = mu, deterministic), antithetic or qmc; several, sample,mu: side by side. "
        "Default: the model's.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of the routing noise.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...; default: CUDA if there is any.")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32 or bfloat16; default: the checkpoint's.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Open the model with another option, e.g. rank_damping=0.25."),
]
TASKS_DIR = ("--tasks-dir", "--data-dir")  # the second is what it was called
WindowsOption = Annotated[int, typer.Option("--windows", min=2, help="Held-out windows of the model's context.")]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Windows per forward pass.")]
