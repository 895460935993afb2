"""The public functions of the seed lattice: arguments are checked here, and only here."""

import torch
from torch import Tensor

from esper_kernels.reference import chunk as _chunk
from esper_kernels.reference import span as _span

__all__ = ["chunk_seeds", "span_seeds"]


def chunk_seeds(
    x_TD: Tensor,
    w1_SCH: Tensor,
    b1_SH: Tensor,
    w2_SHC: Tensor,
    alpha_S: Tensor,
    phi_S: Tensor,
    hidden_S: Tensor,
) -> Tensor:
    """Add every awake chunk seed to its own chunk of the activations.

    `y_s = x_s + alpha_s * phi_s(x_s W1_s + b1_s) W2_s`, computed in fp32 (fp64 for fp64 input).

    Args:
        x_TD: Activations, `[T, D]`; seed s owns channels `s*C` to `(s+1)*C`.
        w1_SCH: Incoming weights, `[S, C, H]`, with `S * C == D`.
        b1_SH: Hidden biases, `[S, H]`.
        w2_SHC: Outgoing weights, `[S, H, C]`.
        alpha_S: Blend weight per seed, `[S]`, fp32, in [0, 1], no unit.
        phi_S: Code of each seed's function (`esper_kernels.Phi`), `[S]`, int32.
        hidden_S: Hidden units that each seed uses, `[S]`, int32; the rest have no effect.

    Returns:
        `[T, D]` in the dtype of `x_TD`. Where alpha is 0 the chunk is the input's bit for bit,
        whatever the weights hold; with no awake seed the result is `x_TD` itself.

    Raises:
        ValueError: If the shapes do not agree.
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
    _require_rows(S, alpha_S=alpha_S, phi_S=phi_S, hidden_S=hidden_S)
    # autocast would compute in half precision what is promised in fp32
    with torch.autocast(x_TD.device.type, enabled=False):
        return _chunk.chunk_seeds(x_TD, w1_SCH, b1_SH, w2_SHC, alpha_S, phi_S, hidden_S)


def span_seeds(
    x_TI: Tensor,
    z_TO: Tensor,
    w_in_SI: Tensor,
    b_S: Tensor,
    w_out_SO: Tensor,
    alpha_S: Tensor,
    phi_S: Tensor,
) -> Tensor:
    """Add every awake unit of a span to the span's output.

    `y = z + sum_s alpha_s * phi_s(x . w_in_s + b_s) * w_out_s`, in fp32 (fp64 for fp64 input).

    Args:
        x_TI: Input of the span's first module, `[T, I]`.
        z_TO: Output of its last module, `[T, O]`.
        w_in_SI: Incoming weights, `[S, I]`.
        b_S: Biases, `[S]`.
        w_out_SO: Outgoing weights, `[S, O]`.
        alpha_S: Blend weight per unit, `[S]`, fp32, in [0, 1], no unit.
        phi_S: Code of each unit's function (elementwise ones only), `[S]`, int32.

    Returns:
        `[T, O]` in the dtype of `z_TO`; `z_TO` itself when no unit is awake.

    Raises:
        ValueError: If the shapes do not agree.
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
    if len(w_out_SO) != S:
        raise ValueError(f"w_out_SO must have {S} rows, one per unit, but got {len(w_out_SO)}.")
    _require_rows(S, b_S=b_S, alpha_S=alpha_S, phi_S=phi_S)
    with torch.autocast(x_TI.device.type, enabled=False):
        return _span.span_seeds(x_TI, z_TO, w_in_SI, b_S, w_out_SO, alpha_S, phi_S)


def _require_rows(num_seeds: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != (num_seeds,):
            raise ValueError(
                f"{name} must have one value per seed, shape ({num_seeds},), "
                f"but got {tuple(tensor.shape)}."
            )
