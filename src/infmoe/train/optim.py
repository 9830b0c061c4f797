"""The optimizer: AdamW in groups, and the learning rate as a function of the step."""

import math
from typing import Any

import torch
import torch.distributed as dist
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


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over `param_groups`, sharded over the processes at `zero_stage=1`; `set_lr` moves the learning rates."""
    groups = param_groups(model, lr=config.lr, weight_decay=config.weight_decay)
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}
    if config.zero_stage == 0 or not (dist.is_available() and dist.is_initialized()):
        return torch.optim.AdamW(groups, **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer  # not of every build of torch

    return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options)


def own_share(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer of this process's share of the parameters; of all of them where it is not sharded."""
    return getattr(optimizer, "optim", optimizer)


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
    """The optimizer's state as flat tensors named `parameter/entry`: what a safetensors file can hold.

    Of a sharded optimizer every process calls this, and the main process alone gets the state, all of it. One tensor
    travels at a time: torch's `consolidate_state_dict` pickles a whole share, byte by byte, and keeps it.
    """
    own = own_share(optimizer)
    held = {
        f"{name}/{entry}": value.detach()
        for name, param in model.named_parameters()
        for entry, value in own.state.get(param, {}).items()
    }
    if own is optimizer:
        return {name: value.cpu().contiguous() for name, value in held.items()}
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, {name: (value.shape, value.dtype) for name, value in held.items()})
    device, found = next(model.parameters()).device, {}
    for rank, share in enumerate(shares):
        for name, (shape, dtype) in share.items():
            mine = held[name].to(device) if name in held else torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(mine.contiguous(), src=rank)
            if dist.get_rank() == 0:
                found[name] = mine.cpu()
    return found


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave; learning rates are not part of it, as the step sets them.

    Raises:
        InfMoEError: a parameter that was trained and is now frozen.
    """
    own = own_share(optimizer)  # the wrapper's `load_state_dict` would keep a second copy of it
    state: dict[int, dict[str, Any]] = {}
    all_positions, positions = _positions(optimizer), _positions(own)
    for name, param in model.named_parameters():
        entries = {k.partition("/")[2]: v for k, v in tensors.items() if k.partition("/")[0] == name}
        if entries and id(param) not in all_positions:
            raise InfMoEError(f"the checkpoint has trained {name}, which the configuration freezes: start a new run")
        if entries and id(param) in positions:
            state[positions[id(param)]] = entries
    own.load_state_dict({"state": state, "param_groups": own.state_dict()["param_groups"]})


def _positions(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """The place of each parameter in the optimizer's state, by its id."""
    return {id(p): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
