"""Launching a Triton kernel: on a device, in the interpreter, or written down to be compiled ahead of time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from triton.runtime.jit import JITFunction


class Launch(NamedTuple):
    """One launch of a kernel, as `recording` sees it."""

    kernel: Any
    args: tuple
    options: dict[str, Any]


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of running them (for tensors on any device): what to compile ahead of time."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


# torch finds the kernels of an operator by this name in its source
class wrap_triton:
    """`torch.library.wrap_triton`, which also runs interpreted kernels, records, and keeps to the device."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: tuple) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            if _recorded is not None:
                _recorded.append(Launch(self.kernel, args, options))
            elif not isinstance(self.kernel, JITFunction):  # TRITON_INTERPRET=1
                if not isinstance(args[0], torch._subclasses.FakeTensor):
                    self.kernel[grid](*args, **options)
            elif (traceable := torch.library.wrap_triton(self.kernel)) is not self.kernel:
                options.pop("maxnreg", None)  # torch 2.13 knows num_warps alone
                traceable[grid](*args, **options)
            else:
                with torch.cuda.device_of(args[0]):
                    self.kernel[grid](*args, **options)

        return launch
