"""The optimizer: AdamW in groups, and the learning rate as a function of the step."""

import math
from typing import Any

import torch
from torch import nn

from infmoe.errors import InfMoEError
from infmoe.layers import InfinityFFN
from infmoe.train.config import OptimConfig, ScheduleConfig


def param_groups(model: nn.Module, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups over the parameters that train.

    Decay falls on matrices, embeddings included; biases and norms have none. W_z has the learning rate factor and the
    decay that its layer was built with (`wz_lr_factor`, `wz_weight_decay`). Each group has its learning rate and,
    in `lr_factor`, what that is over `lr`.

    For trainers other than `infmoe.train`, which know neither W_z's options nor that the biases of stacked experts are
    no matrices: `Trainer(..., optimizers=(AdamW(param_groups(model, lr=..., weight_decay=...)), None))`. Make them once
    all that is not to train is frozen. Trainer takes no optimizer from outside under FSDP, so there W_z's options do
    nothing.

    Args:
        model: or anything that contains layers of `infmoe.layers`.
        lr: of all but W_z.
        weight_decay: of all matrices but W_z, and of W_z where its layer names none.
    """
    of_wz: dict[nn.Parameter, tuple[float, float]] = {}
    for layer in model.modules():
        if isinstance(layer, InfinityFFN):
            decay = weight_decay if layer.wz_weight_decay is None else layer.wz_weight_decay
            of_wz |= dict.fromkeys(layer.w_z.parameters(), (layer.wz_lr_factor, decay))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            factor, decay = of_wz.get(param, (1.0, weight_decay))
            # the biases of stacked experts have two dimensions, yet are no matrices
            is_matrix = param.ndim >= 2 and not name.rpartition(".")[2].startswith("b")
            groups.setdefault((factor, decay if is_matrix else 0.0), []).append(param)
    return [
        {"params": params, "lr": lr * factor, "weight_decay": decay, "lr_factor": factor}
        for (factor, decay), params in groups.items()
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `param_groups`; `set_lr` moves their learning rates."""
    groups = param_groups(model, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


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
