"""Real training runs that differ in nothing but their seeds: how often is a winner called?"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from scipy.stats import binom

from esper.evidence.paired import one_sided
from esper.evidence.verdict import ALPHA

EXPERIMENTS, PAIRS = 60, 16
CONFIG = {
    "task": {"name": "spirals"},
    "host": {"name": "mlp", "options": {"hidden": [32]}},
    "train": {"steps": 300, "batch_size": 256, "learning_rate": 0.01, "interval_steps": 300},
}


def accuracy(seed_and_salt: tuple[int, int]) -> float:
    import torch

    from esper.config.run import RunConfig
    from esper.evidence.records import Fingerprint
    from esper.trial import Trial, TrialSpec

    torch.set_num_threads(1)
    seed, salt = seed_and_salt
    mark = Fingerprint(code_hash="", commit=None, versions={}, device="cpu")
    config = RunConfig.model_validate({**CONFIG, "seed_salt": salt})
    trial = Trial(config, TrialSpec("a", 0, seed, 0, "", mark))
    trial.run_for(60.0)
    return trial.record().metrics["test_accuracy"]


@pytest.mark.slow
def test_real_aa_experiments_call_no_more_winners_than_promised(record_property):
    runs = [
        (1000 * k + pair, salt)
        for k in range(EXPERIMENTS)
        for pair in range(PAIRS)
        for salt in (0, 1)
    ]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        values = np.array(list(pool.map(accuracy, runs, chunksize=16)))
    values = values.reshape(EXPERIMENTS, PAIRS, 2)
    sides = [one_sided(v[:, 1] - v[:, 0]) for v in values]
    wins = sum(p.greater <= ALPHA for p in sides)
    losses = sum(p.less <= ALPHA for p in sides)
    record_property("wins", wins)
    record_property("losses", losses)
    print(f"{EXPERIMENTS} real A/A experiments of {PAIRS} pairs: {wins} WIN, {losses} LOSE")
    # 99 % of all such studies stay at or below this count if the promised 2.5 % hold
    most = int(binom.ppf(0.99, EXPERIMENTS, ALPHA))
    assert max(wins, losses) <= most
