"""A linear map that is quick for a few rows too, and what may be done with one from outside.

B batch rows, T tokens, I inputs, O outputs.
"""

from torch import Tensor, nn

from infmoe.ops.masked_ffn import compiled, few_tokens


class Linear(nn.Linear):
    """`torch.nn.Linear`, but that on the CPU, without gradients, a few rows are multiplied by all threads."""

    def forward(self, input: Tensor) -> Tensor:
        return few_tokens.linear(input, self.weight, self.bias)


def product(linear: nn.Module, x_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
    """W x, and the bias that is still to be added (None where it was)."""
    if not is_plain(linear):
        return linear(x_BTD), None
    assert isinstance(linear, Linear)
    return few_tokens.linear(x_BTD, linear.weight, None), linear.bias


def affine(linear: nn.Module | None) -> few_tokens.Affine | None:
    """Weight and bias of a linear map that is just that: not wrapped (LoRA), quantised, or hooked into; else None."""
    if type(linear) is not Linear or is_hooked(linear):
        return None
    weight = linear.weight
    return (weight, linear.bias) if weight.dtype in compiled.DTYPES else None


def is_plain(linear: nn.Module | None) -> bool:
    return affine(linear) is not None


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says (hooks; Accelerate's replace `forward`)."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
