"""How alike the trained networks of two arms are: outputs and curves, from stored records alone.

A pair of runs is compared where both finished. What the control differs from itself, run a second
time as an arm of its own, is told beside it: without that no difference means anything.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from esper.evidence.health import runs_of
from esper.evidence.records import TrialRecord
from esper.evidence.similarity import (
    Parted,
    Similarity,
    compare_curves,
    compare_runs,
    first_divergent_step,
    similarity,
)

CURVE = "train_loss"


class ArmsAlike(NamedTuple):
    """Two arms, and the control's second run where there is one.

    Attributes:
        treatment: Name of an arm, and so the next two; `noise` may be None.
        control: The other.
        noise: The control once more.
        pairs: In which all of them finished.
        left_out: In which one collapsed or has no record.
        outputs: Treatment against control, the rows of all pairs together.
        noise_outputs: The control's second run against its first.
        within_noise: Whether the treatment is no further from the control than that from itself, in
            outputs and in curves; None without a second run.
        parted: Of each pair, the interval (from 1) at which the training losses first differ in any
            bit; None: nowhere.
        noise_parted: The same of the control against itself.
    """

    treatment: str
    control: str
    noise: str | None
    pairs: int
    left_out: int
    outputs: Similarity
    noise_outputs: Similarity | None
    within_noise: bool | None
    parted: list[int | None]
    noise_parted: list[int | None] | None


def compare_arms(
    records: Sequence[TrialRecord], treatment: str, control: str, noise: str | None = None
) -> ArmsAlike:
    """Compare what the networks of two arms say of the same rows.

    Args:
        records: Of a whole sweep, whose runs set `kept_outputs`.
        treatment: Name of an arm.
        control: Name of another.
        noise: Name of an arm that is the control run a second time, with the same seeds.

    Raises:
        ValueError: If an arm is unknown, no pair finished in all arms, outputs were not kept, or
            they are of other rows or columns.
    """
    names = [treatment, control, *([] if noise is None else [noise])]
    known = sorted({r.arm for r in records})
    if unknown := [n for n in names if n not in known]:
        raise ValueError(f"arms must be among {', '.join(known)}, but got '{unknown[0]}'.")
    if len(set(names)) < len(names):
        raise ValueError(f"arms must differ, but got {', '.join(names)}.")
    by_arm = {n: {r.pair: r for r in runs_of(records, n)} for n in names}
    every = sorted({pair for runs in by_arm.values() for pair in runs})

    def has_finished(pair: int) -> bool:
        found = [by_arm[name].get(pair) for name in names]
        return all(r is not None and r.status == "finished" for r in found)

    whole = [pair for pair in every if has_finished(pair)]
    if not whole:
        raise ValueError(f"a pair must have finished in {', '.join(names)}, but none did.")
    runs = {n: [by_arm[n][pair] for pair in whole] for n in names}
    if bare := [r.trial_id for rs in runs.values() for r in rs if r.outputs is None]:
        raise ValueError(
            f"outputs must be kept, but {len(bare)} records have none ({bare[0]}); set "
            "`kept_outputs: 64` under `run` and run the sweep again."
        )
    outputs = {n: torch.cat([_tensor(r) for r in rs]) for n, rs in runs.items()}
    curves = {n: [r.curves[CURVE] for r in rs] for n, rs in runs.items()}
    left_out = len(every) - len(whole)
    if noise is None:
        steps = list(map(first_divergent_step, curves[treatment], curves[control]))
        return ArmsAlike(
            treatment, control, None, len(whole), left_out,
            similarity(outputs[treatment], outputs[control]), None, None,
            list(map(_interval, steps)), None,
        )  # fmt: skip
    judged = compare_runs(outputs[treatment], outputs[control], outputs[noise])
    parted: list[Parted] = list(
        map(compare_curves, curves[treatment], curves[control], curves[noise])
    )
    return ArmsAlike(
        treatment, control, noise, len(whole), left_out, judged.treatment, judged.noise,
        judged.within_noise and all(p.within_noise for p in parted),
        [_interval(p.treatment_step) for p in parted], [_interval(p.noise_step) for p in parted],
    )  # fmt: skip


def _tensor(record: TrialRecord) -> Tensor:
    return torch.tensor(record.outputs, dtype=torch.float32)


def _interval(step: int | None) -> int | None:
    return None if step is None else step + 1
