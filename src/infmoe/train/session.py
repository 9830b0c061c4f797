"""What a run is made of: processes, model, optimizer and data, built from the configuration or restored.

B rows, T tokens.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from infmoe import checkpoint as ckpt
from infmoe.data import DataOrder, TokenData
from infmoe.data.manifest import MANIFEST, Split
from infmoe.errors import InfMoEError
from infmoe.eval.loading import Opened
from infmoe.hf import InfMoEConfig, InfMoEForCausalLM
from infmoe.hf.identity import fingerprint
from infmoe.layers.routing import NoiseKey, Routing
from infmoe.train.config import RunConfig, hf_config
from infmoe.train.description import remarks
from infmoe.train.elastic import check_elastic
from infmoe.train.initial import describe_start, open_initial
from infmoe.train.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors, own_share
from infmoe.train.run_dir import Hold, Start, open_run, run_record

R = TypeVar("R")


@dataclass
class Session:
    """A run ready to step; `start` builds it.

    Attributes:
        config: the run's configuration.
        out: its folder.
        record: what `run.json` and every checkpoint say about it.
        accelerator: the processes it runs on.
        model: wrapped for them.
        optimizer: over the model's parameters.
        data: the token streams.
        order: which window of the training split comes as the n-th.
        accumulation: micro-batches per process and step.
        num_val_windows: windows that an evaluation looks at.
        first_step: optimizer steps taken before.
        checkpoint: where they were loaded from.
    """

    config: RunConfig
    out: Path
    record: dict[str, Any]
    accelerator: Accelerator
    model: Any
    optimizer: torch.optim.Optimizer
    data: TokenData
    order: DataOrder
    accumulation: int
    num_val_windows: int
    first_step: int
    checkpoint: Path | None

    @staticmethod
    def start(config: RunConfig, out: Path, resume: bool, hold: Hold | None = None) -> "Session":
        """Build everything, restored where `resume` finds a checkpoint; mistakes surface before any write.

        The main process takes `hold`, where there is one.
        """
        data, model_config = _open_data(config)
        order = DataOrder(data.num_windows("train", config.window, at_least=max(1, config.batch_rows)), config.seed)
        num_val_windows = _num_val_windows(config, data)
        accelerator = _start_accelerator(config, model_config)
        accumulation = config.accumulation(accelerator.num_processes)
        record = run_record(config, hashlib.sha256((data.folder / MANIFEST).read_bytes()).hexdigest())
        initial: list[Opened] = []  # on the main process; the others get the weights from it

        def claim() -> Start:
            if config.init is not None and not (resume and ckpt.checkpoints(out)):
                opened = open_initial(config.init, model_config, data)
                initial.append(opened)
                record["init"] = {"checkpoint": str(opened.checkpoint), "fingerprint": fingerprint(opened.model)}
            for remark in remarks(config, model_config):
                ckpt.to_stderr(remark)
            return open_run(out, record, resume=resume, say=ckpt.to_stderr, hold=hold)

        begin = on_main(accelerator, claim)

        disable_progress_bar()  # transformers' own, for every file that is read or written
        torch.manual_seed(config.seed)
        if begin.checkpoint is None:
            model = InfMoEForCausalLM(model_config)
            if initial:
                opened = initial.pop()
                model.load_state_dict(opened.model.state_dict())
                ckpt.to_stderr(describe_start(opened, model_config))
        else:
            model = InfMoEForCausalLM.from_pretrained(begin.checkpoint, use_safetensors=True, dtype=torch.float32)
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable()
        model = accelerator.prepare(model.train())
        bare = accelerator.unwrap_model(model)
        optimizer = build_optimizer(bare, config.optim)
        if begin.checkpoint is not None:
            load_optimizer_tensors(bare, optimizer, load_file(begin.checkpoint / ckpt.OPTIMIZER))
        return Session(
            config=config,
            out=out,
            record=record,
            accelerator=accelerator,
            model=model,
            optimizer=optimizer,
            data=data,
            order=order,
            accumulation=accumulation,
            num_val_windows=num_val_windows,
            first_step=begin.step,
            checkpoint=begin.checkpoint,
        )

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return int(self.accelerator.unwrap_model(self.model).config.num_hidden_layers)

    def micro_batch(self, step: int, micro: int, *, stats_tokens: int) -> tuple[Tensor, Routing]:
        """This process's part `micro` of the batch of `step`.

        The k-th micro-batch of all processes holds the same samples however many processes share the work.
        """
        rows = self.config.micro_batch_size
        place = micro * self.accelerator.num_processes + self.accelerator.process_index
        first = step * self.config.batch_rows + place * rows
        samples = np.arange(first, first + rows)
        return self.rows("train", self.order.indices(samples), samples, step=step, stats_tokens=stats_tokens)

    def rows(
        self,
        split: Split,
        windows: NDArray[np.int64],
        streams: NDArray[np.int64],
        *,
        step: int,
        stats_tokens: int,
    ) -> tuple[Tensor, Routing]:
        """Tokens of these windows on the device, int64, (B, T), and a routing with these noise streams."""
        tokens_BT = self._to_device(self.data.windows(split, windows, self.config.window))
        key = NoiseKey(seed=self.config.seed, step=step, stream=self._to_device(streams))
        return tokens_BT, Routing(key=key, max_stats_tokens=stats_tokens)

    def autocast(self) -> AbstractContextManager:
        """The forward pass's precision.

        Not Accelerate's, which would also copy the logits to float32, the largest tensor of all.
        """
        device_type = self.accelerator.device.type
        return torch.autocast(device_type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def save(self, step: int) -> Path:
        """Write the checkpoint of `step`, from the main process, and drop those no longer kept."""
        shared = own_share(self.optimizer) is not self.optimizer
        state: dict[str, Tensor] = {}
        if shared or self.accelerator.is_main_process:
            state = optimizer_tensors(self.accelerator.unwrap_model(self.model), self.optimizer)

        def write() -> Path:
            path = ckpt.write_checkpoint(self.out, step, lambda folder: self._fill(folder, step, state))
            ckpt.prune(self.out, step, self.config.checkpoint.keep_last)
            return path

        return on_main(self.accelerator, write)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the process group, if there is one."""
        if self.accelerator.num_processes > 1:
            # DDP must go first: if it held the group's last reference, its destructor would wait for gloo's
            # threads under the GIL, which they may be waiting for in turn
            self.model = self.accelerator.unwrap_model(self.model)
            self.accelerator.free_memory()
            self.accelerator.end_training()

    def _fill(self, folder: Path, step: int, optimizer_state: dict[str, Tensor]) -> None:
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(folder)
        for file in sorted((self.data.folder / "tokenizer").glob("*.json")):
            shutil.copyfile(file, folder / file.name)
        save_file(optimizer_state, folder / ckpt.OPTIMIZER)
        state = {"step": step, "tokens": step * self.config.batch_tokens, **self.record}
        (folder / ckpt.TRAINER_STATE).write_text(json.dumps(state, indent=2) + "\n")

    def _to_device(self, array: NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.accelerator.device.type != "cuda":
            return tensor.to(self.accelerator.device)
        return tensor.pin_memory().to(self.accelerator.device, non_blocking=True)


def on_main(accelerator: Accelerator, task: Callable[[], R]) -> R:
    """Run `task` on the main process; all processes get its result, or all raise its InfMoEError."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = task()
        except InfMoEError as error:
            outcome[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise InfMoEError(outcome[1])
    return outcome[0]


def seed_dropout(seed: int, step: int, process: int) -> None:
    """Make dropout a function of (seed, step, process), so that no generator's state need be saved."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, process)).generate_state(1, np.uint64)[0]))


def _start_accelerator(config: RunConfig, model_config: InfMoEConfig) -> Accelerator:
    for variable, name in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ):
        if os.environ.get(variable, "false").lower() == "true":
            raise InfMoEError(
                f"training does not support {name}: launch with plain DDP (accelerate launch --multi_gpu), and "
                "--set optim.zero_stage=1 to share the optimizer's state"
            )
    # routing by z = mu leaves the map to sigma without a gradient, for which DDP would wait forever
    idle = model_config.has_sigma and not model_config.draws()
    ddp = DistributedDataParallelKwargs(find_unused_parameters=idle, gradient_as_bucket_view=True)
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.accelerator.is_available(), kwargs_handlers=[ddp])
    if accelerator.distributed_type not in (
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
    ):
        raise InfMoEError(f"training does not support {accelerator.distributed_type.value}: launch with plain DDP")
    return accelerator


def _open_data(config: RunConfig) -> tuple[TokenData, InfMoEConfig]:
    """The data, and the model's configuration with the data's end-of-text token where it names none."""
    if config.data.dir is None:
        raise InfMoEError("data.dir is not set: pass --set data.dir=FOLDER, a folder made by `infmoe data`")
    data = TokenData.open(config.data.dir)
    model_config = hf_config(config)
    if data.vocab_size > model_config.vocab_size:
        raise InfMoEError(
            f"{data.folder} has {data.vocab_size} token ids, the model {model_config.vocab_size}: "
            f"set model.vocab_size={data.vocab_size}"
        )
    with torch.device("meta"):
        InfMoEForCausalLM(model_config)  # refuses what cannot be built before anything is written
    check_elastic(config.elastic, model_config)
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(model_config, name) is None:
            setattr(model_config, name, data.eot_id)
    return data, model_config


def _num_val_windows(config: RunConfig, data: TokenData) -> int:
    """Windows that an evaluation looks at: as many as asked for, or all there are."""
    if config.eval.every is None:
        return 0
    remedy = "train without evaluation (--set eval.every=null), or on data prepared with a larger --val-fraction"
    if not data.info("val").tokens:
        raise InfMoEError(f"{data.folder} has no val split: {remedy}")
    return min(config.eval.windows, data.num_windows("val", config.window, remedy=remedy))
