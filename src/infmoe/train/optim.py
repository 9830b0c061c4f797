"""The optimizer: AdamW in groups, and the learning rate as a function of the step."""

import math
from typing import Any

import torch
from torch import nn

from infmoe.errors import InfMoEError
from infmoe.train.config import OptimConfig, ScheduleConfig


def build_optimizer(
    model: nn.Module, config: OptimConfig, *, wz_lr_factor: float = 1.0, wz_weight_decay: float | None = None
) -> torch.optim.AdamW:
    """AdamW over the parameters that train.

    Decay falls on matrices, embeddings included; biases and norms have none. W_z has its own learning rate
    factor and decay. Each group keeps its factor in `lr_factor`; `set_lr` applies it.

    Args:
        model: names its W_z parameters `...w_z...`.
        config: the run's settings.
        wz_lr_factor: W_z's learning rate over the others'.
        wz_weight_decay: W_z's decay; None: as the other matrices.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        *modules, leaf = name.split(".")
        is_wz = "w_z" in modules
        # the biases of stacked experts have two dimensions, yet are no matrices
        is_matrix = param.ndim >= 2 and not leaf.startswith("b")
        decay = config.weight_decay if not is_wz or wz_weight_decay is None else wz_weight_decay
        key = (wz_lr_factor if is_wz else 1.0, decay if is_matrix else 0.0)
        groups.setdefault(key, []).append(param)
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": wd, "lr_factor": f} for (f, wd), params in groups.items()],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def lr_ratio(step: int, num_steps: int, config: ScheduleConfig) -> float:
    """Learning rate over its peak at update number `step`, counted from 0.

    Warm-up reaches the peak at update `warmup_steps - 1`; the cosine ends one past the last update, so that
    none is spent at a rate of zero.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (num_steps - config.warmup_steps)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as flat tensors named `parameter/entry`: what a safetensors file can hold."""
    return {
        f"{name}/{entry}": value.detach().cpu().contiguous()
        for name, param in model.named_parameters()
        for entry, value in optimizer.state.get(param, {}).items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave; learning rates are not part of it, as the step sets them.

    Raises:
        InfMoEError: a parameter that was trained and is now frozen.
    """
    state: dict[int, dict[str, Any]] = {}
    positions = {id(p): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    for name, param in model.named_parameters():
        entries = {k.partition("/")[2]: v for k, v in tensors.items() if k.partition("/")[0] == name}
        if entries and id(param) not in positions:
            raise InfMoEError(f"the checkpoint has trained {name}, which the configuration freezes: start a new run")
        if entries:
            state[positions[id(param)]] = entries
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
