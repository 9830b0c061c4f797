"""What torch.compile is told about functions that it should not look into."""

import os
from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def constant(function: F) -> F:
    """Let torch.compile run the function while it traces, and take the result as a constant.

    What `torch.compiler.assume_constant_result` does, without its import of the compiler, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


ENVIRONMENT = "INFMOE_BACKEND"


@constant
def plain_wanted() -> bool:
    """Whether the environment asks for the plain path, which operators without a backend of their own follow."""
    return os.environ.get(ENVIRONMENT) == "eager"
