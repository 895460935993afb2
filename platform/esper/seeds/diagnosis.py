"""What ails the seeds of a site: units that are silent, weights that are no numbers, gradients.

Asked between intervals, never in a pass. Where a pool is sharded every process must ask.

Shapes: S = seeds, T = rows, I = input features of a span, D = channels of the site's output.
"""

import math

import torch
from torch import Tensor

from esper.seeds.kasmina import KasminaLayer
from esper.seeds.local_rows import all_rows, local_rows
from esper_kernels import PHI
from esper_kernels.learning import TASK


@torch.no_grad()
def silent_frac(layer: KasminaLayer, source: Tensor | None) -> Tensor:
    """Share of each awake seed's hidden units that are 0 in all rows, `[S]`, on the CPU.

    Args:
        layer: Whose seeds.
        source: Rows that the seeds read, `[T, I]` (chunk sites: all channels, `[T, D]`).

    Returns:
        NaN for seeds that sleep or have no hidden units, and for all without `source`.
    """
    found = torch.full((layer.num_seeds,), math.nan)
    if source is None:
        return found
    seeds = (layer.awake().cpu() & (layer.hidden_used.cpu() > 0)).nonzero()[:, 0]
    if layer.geometry == "span":
        # all units of one function at once: there may be thousands
        codes = layer.phi.cpu()[seeds]
        for code in codes.unique().tolist():
            some = seeds[codes == code].to(source.device)
            z = source @ layer.w_in[some].float().T + layer.bias[some].float()
            found[some.cpu()] = (PHI[code](z) == 0).all(0).float().cpu()
        return found
    (w_in, held), (bias, _) = local_rows(layer.w_in), local_rows(layer.bias)
    for seed in [s for s in seeds.tolist() if held.start <= s < held.stop]:
        used, code, at = int(layer.hidden_used[seed]), int(layer.phi[seed]), seed - held.start
        read = source[:, seed * layer.fan_in : (seed + 1) * layer.fan_in]
        z = (read @ w_in[at].float() + bias[at].float())[:, :used]
        found[seed] = (PHI[code](z) == 0).all(0).float().mean().cpu()
    return all_rows(found[held].to(source.device), layer.w_in).cpu()


def finite(layer: KasminaLayer) -> Tensor:
    """Whether all weights of each seed are numbers, `[S]`, on the CPU."""
    rows = [local_rows(weights)[0].isfinite() for weights in layer.pool()]
    sound = torch.stack([r.reshape(len(r), -1).all(1) for r in rows]).all(0)
    return all_rows(sound.to(torch.uint8), layer.w_in).cpu() > 0


def grad_rms(layer: KasminaLayer) -> Tensor:
    """Root mean square gradient of each seed's parameters at the last step, `[S]`, on the CPU.

    NaN for seeds that do not learn on the task, and for all before the first step.
    """
    found = torch.full((layer.num_seeds,), math.nan)
    grads = [w.grad for w in layer.pool() if w.grad is not None]
    learns = (layer.learning == TASK).cpu()
    if not grads or not learns.any():
        return found
    rows = [local_rows(g)[0] for g in grads]
    own = torch.stack([g.float().square().reshape(len(g), -1).sum(1) for g in rows]).sum(0)
    squares = all_rows(own, grads[0])
    trained = layer.w_in, *((layer.bias,) if layer.biased else ()), layer.w_out
    used = sum(math.prod(w.shape[1:]) for w in trained if w.requires_grad)
    return torch.where(learns, (squares / used).sqrt().cpu(), found)
