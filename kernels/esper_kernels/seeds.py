"""The public functions of the seed lattice: arguments are checked here, and only here.

On CUDA tensors of fp32, bf16 or fp16 they run Triton kernels; on all others, in fp64, and where
a user's own function of the hidden units is involved, plain PyTorch.
"""

from typing import get_args

import torch
from torch import Tensor

from esper_kernels import library
from esper_kernels.learning import OBJECTIVES, Objective
from esper_kernels.phi import FIRST_CUSTOM
from esper_kernels.probe import probe_size
from esper_kernels.reference import statistics as _statistics

__all__ = [
    "chunk_seeds",
    "column_statistics",
    "gradient_energy",
    "span_seeds",
]


def chunk_seeds(
    x_TD: Tensor,
    w1_SCH: Tensor,
    b1_SH: Tensor,
    w2_SHC: Tensor,
    alpha_S: Tensor,
    phi_S: Tensor,
    hidden_S: Tensor,
    *,
    learning_S: Tensor | None = None,
    probe: Tensor | None = None,
    objective: Objective = "desired_update",
    observe: bool = False,
    plain: bool | None = None,
) -> Tensor:
    """Add every awake chunk seed to its own chunk of the activations.

    `y_s = x_s + alpha_s * phi_s(x_s W1_s + b1_s) W2_s`, computed in fp32 (fp64 for fp64 input;
    on a GPU, 16-bit input is multiplied in its own format and accumulated in fp32).

    Gradients of the first order reach `x_TD`, the weights and `alpha_S`.

    Args:
        x_TD: Activations, `[T, D]`; seed s owns channels `s*C` to `(s+1)*C`.
        w1_SCH: Incoming weights, `[S, C, H]`, with `S * C == D`.
        b1_SH: Hidden biases, `[S, H]`.
        w2_SHC: Outgoing weights, `[S, H, C]`.
        alpha_S: Blend weight per seed, `[S]`, fp32, in [0, 1], no unit.
        phi_S: Code of each seed's function (`esper_kernels.Phi`), `[S]`, int32.
        hidden_S: Hidden units that each seed uses, `[S]`, int32; the rest have no effect.
        learning_S: What the gradient of each seed's weights is, `[S]`, int32. 0: none; 1: that
            of the loss; 2: that of the isolated `objective`, for a seed at alpha 0
            (`esper_kernels.learning`). None: all 1.
        probe: Receives, as its gradient, what a pass measures; a leaf of shape
            `[probe_size(D, S)]`, fp32, that requires grad. See `esper_kernels.probe`.
        objective: What a seed that learns alone is to add to its chunk: 'desired_update' or
            'reconstruction'.
        observe: Whether the statistics of activations and gradients are measured for `probe`.
        plain: True: plain PyTorch on every device, which functions of `register_phi` need; it
            then waits for the device, so it cannot be captured in a CUDA graph. None: found
            out where the codes are on the CPU, else False.

    Returns:
        `[T, D]` in the dtype of `x_TD`, a tensor of its own. Where alpha is 0 the chunk is the
        input's bit for bit, whatever the weights hold.

    Raises:
        ValueError: If shapes or dtypes do not agree, or the objective is unknown.
    """
    S, C, H = w1_SCH.shape
    if x_TD.ndim != 2 or x_TD.shape[1] != S * C:
        raise ValueError(
            f"x_TD must have shape [T, {S * C}] ({S} seeds of {C} channels), "
            f"but got {tuple(x_TD.shape)}; flatten the batch and put the channels last."
        )
    if b1_SH.shape != (S, H) or w2_SHC.shape != (S, H, C):
        raise ValueError(
            f"b1_SH and w2_SHC must have shapes {(S, H)} and {(S, H, C)} as w1_SCH says, "
            f"but got {tuple(b1_SH.shape)} and {tuple(w2_SHC.shape)}."
        )
    if learning_S is None:
        learning_S = torch.ones_like(phi_S)
    _require_rows(S, alpha_S=alpha_S)
    _require_rows(S, torch.int32, phi_S=phi_S, hidden_S=hidden_S, learning_S=learning_S)
    _require_probe(probe, S * C, S)
    code, plain = _code(objective), _is_plain(plain, phi_S)
    y_TD: Tensor = torch.ops.esper.chunk_seeds.default(
        x_TD, w1_SCH, b1_SH, w2_SHC, alpha_S, phi_S, hidden_S, learning_S, probe,
        code, observe, plain,
    )[0]  # fmt: skip
    return y_TD


def span_seeds(
    x_TI: Tensor,
    z_TO: Tensor,
    w_in_SI: Tensor,
    b_S: Tensor,
    w_out_SO: Tensor,
    alpha_S: Tensor,
    phi_S: Tensor,
    *,
    learning_S: Tensor | None = None,
    probe: Tensor | None = None,
    objective: Objective = "desired_update",
    observe: bool = False,
    plain: bool | None = None,
) -> Tensor:
    """Add every awake unit of a span to the span's output.

    `y = z + sum_s alpha_s * phi_s(x . w_in_s + b_s) * w_out_s`, in fp32 (fp64 for fp64 input;
    on a GPU, 16-bit input is multiplied in its own format and accumulated in fp32).

    Args:
        x_TI: Input of the span's first module, `[T, I]`.
        z_TO: Output of its last module, `[T, O]`.
        w_in_SI: Incoming weights, `[S, I]`.
        b_S: Biases, `[S]`.
        w_out_SO: Outgoing weights, `[S, O]`.
        alpha_S: Blend weight per unit, `[S]`, fp32, in [0, 1], no unit.
        phi_S: Code of each unit's function (elementwise ones only), `[S]`, int32.
        learning_S: As for `chunk_seeds`.
        probe: As for `chunk_seeds`, of shape `[probe_size(O, S)]`.
        objective: As for `chunk_seeds`; the unit is to add it to the whole output.
        observe: As for `chunk_seeds`, of the output.
        plain: As for `chunk_seeds`.

    Returns:
        `[T, O]` in the dtype of `z_TO`, a tensor of its own; the output bit for bit when no
        unit is awake.

    Raises:
        ValueError: If shapes or dtypes do not agree, or the objective is unknown.
    """
    S, I = w_in_SI.shape  # noqa: E741 (I is the legend's name for input features)
    O = w_out_SO.shape[1]  # noqa: E741
    if x_TI.ndim != 2 or x_TI.shape[1] != I:
        raise ValueError(f"x_TI must have shape [T, {I}], but got {tuple(x_TI.shape)}.")
    if z_TO.shape != (x_TI.shape[0], O):
        raise ValueError(
            f"z_TO must have shape {(x_TI.shape[0], O)}, one row for each row of x_TI, "
            f"but got {tuple(z_TO.shape)}; a span's input and output must share their positions."
        )
    if w_out_SO.shape[0] != S:
        raise ValueError(f"w_out_SO must have {S} rows, one per unit, but got {w_out_SO.shape[0]}.")
    if learning_S is None:
        learning_S = torch.ones_like(phi_S)
    _require_rows(S, b_S=b_S, alpha_S=alpha_S)
    _require_rows(S, torch.int32, phi_S=phi_S, learning_S=learning_S)
    _require_probe(probe, O, S)
    code, plain = _code(objective), _is_plain(plain, phi_S)
    y_TO: Tensor = torch.ops.esper.span_seeds.default(
        x_TI, z_TO, w_in_SI, b_S, w_out_SO, alpha_S, phi_S, learning_S, probe,
        code, observe, plain, False,
    )[0]  # fmt: skip
    return y_TO


def column_statistics(x_TD: Tensor) -> Tensor:
    """Sum, sum of squares, and count of `|x| < 1e-6` of each column.

    Args:
        x_TD: Activations, `[T, D]`, of a floating dtype.

    Returns:
        `[3, D]`, fp32, without a gradient.

    Raises:
        ValueError: If x is no matrix of floating point numbers.
    """
    _require_matrix(x_TD=x_TD)
    x_TD = x_TD.detach()
    if library.use_triton(x_TD, x_TD, plain=False):
        from esper_kernels.ops import statistics

        told: Tensor = statistics.column_statistics(x_TD.contiguous())
        return told
    return _statistics.column_statistics(x_TD)


def gradient_energy(dy_TD: Tensor) -> Tensor:
    """T times the sum of squares of each column, independent of the batch for a mean loss.

    Args:
        dy_TD: Gradient of the loss at activations, `[T, D]`.

    Returns:
        `[D]`, fp32, without a gradient.

    Raises:
        ValueError: If dy is no matrix of floating point numbers.
    """
    _require_matrix(dy_TD=dy_TD)
    dy_TD = dy_TD.detach()
    if library.use_triton(dy_TD, dy_TD, plain=False):
        return column_statistics(dy_TD)[1] * len(dy_TD)
    return _statistics.gradient_energy(dy_TD)


def _require_matrix(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be a matrix [T, D] of floating point numbers, "
                f"but got shape {tuple(tensor.shape)} of {tensor.dtype}."
            )


def _require_rows(num_seeds: int, dtype: torch.dtype | None = None, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != (num_seeds,):
            raise ValueError(
                f"{name} must have one value per seed, shape ({num_seeds},), "
                f"but got {tuple(tensor.shape)}."
            )
        if dtype is not None and tensor.dtype != dtype:
            raise ValueError(f"{name} must be of {dtype}, but got {tensor.dtype}.")


def _require_probe(probe: Tensor | None, channels: int, num_seeds: int) -> None:
    size = probe_size(channels, num_seeds)
    if probe is not None and (probe.shape != (size,) or probe.dtype != torch.float32):
        raise ValueError(
            f"probe must have shape ({size},) and be of torch.float32, "
            f"but got {tuple(probe.shape)} of {probe.dtype}; `probe_size` tells the length."
        )


def _code(objective: Objective) -> int:
    if objective not in OBJECTIVES:
        names = " or ".join(f"'{name}'" for name in get_args(Objective))
        raise ValueError(f"objective must be {names}, but got '{objective}'.")
    return OBJECTIVES.index(objective)


def _is_plain(plain: bool | None, phi_S: Tensor) -> bool:
    if plain is not None:
        return plain
    # reading the codes of another device would wait for it, and a compiler has none to read
    if torch.compiler.is_compiling() or phi_S.device.type != "cpu":
        return False
    return bool((phi_S >= FIRST_CUSTOM).any())
