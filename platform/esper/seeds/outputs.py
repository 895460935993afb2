"""What a module gives: one tensor, or several, of which the seeds join the first."""

from typing import Any

from torch import Tensor


def first_of(output: Any) -> Tensor:
    """The tensor that seeds join."""
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def with_first(output: Any, first: Tensor) -> Any:
    """The same output with another such tensor; a named tuple stays one."""
    if not isinstance(output, tuple):
        return first
    outputs = (first, *output[1:])
    return output._make(outputs) if hasattr(output, "_make") else outputs
