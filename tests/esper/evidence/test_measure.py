"""Measuring one process: intervals, warm-up, absence with a reason, and the real thing, tiny."""

import math

import numpy as np
import pytest
import torch

from esper import environment
from esper.config.baseline import BaselineConfig, WarmUp
from esper.evidence import measure
from esper.evidence.baseline_workload import build, inputs
from esper.evidence.measure import Measured, Request, absent, cliff, interval_ranks, quantile

LOOP = {"forward": 8, "step": 4, "window": 2}


@pytest.fixture
def config():
    return BaselineConfig(
        name="tiny", blocks=2, control_blocks={"legacy": 2, "kasmina": 2},
        workload={"width": 8, "seeds_per_layer": 4, "active_seeds": 3, "batch_sizes": (1, 4)},
        requests={"legacy": LOOP, "kasmina": LOOP}, warm_up=WarmUp(max_windows=3), busy_s=0.1,
    )  # fmt: skip


@pytest.mark.parametrize(("m", "q", "ranks"), [(6, 0.5, (1, 6)), (5, 0.5, None), (71, 0.95, None)])
def test_ranks_of_an_interval(m, q, ranks):
    assert interval_ranks(m, q) == ranks


@pytest.mark.parametrize("q", [0.5, 0.95])
def test_the_interval_holds_the_quantile_as_often_as_it_says(q):
    rng = np.random.default_rng(0)
    held = 0
    for sample in rng.random((2_000, 100)):
        found = quantile(np.sort(sample), q, "ms")
        held += found.low <= q <= found.high
    # 95 % at least, by construction; three standard errors of 2,000 draws are 1.5 points
    assert held / 2_000 >= 0.935


def test_a_quantile_of_too_few_requests_is_absent_and_says_how_many_are_needed():
    found = quantile(np.arange(20.0), 0.95, "ms")
    assert found.value is None
    assert found.why == "20 requests; at least 72 are needed for an interval"
    assert quantile(np.arange(72.0), 0.95, "ms").value == 68


@pytest.mark.parametrize("fields", [{"value": None}, {"value": 1.0, "why": "x"},
                                    {"value": math.nan}, {"value": math.inf}])  # fmt: skip
def test_a_quantity_has_a_number_or_a_reason(fields):
    with pytest.raises(ValueError, match="value must be"):
        Measured(unit="ms", **fields)


def test_warm_up_ends_when_three_windows_agree_or_at_the_limit():
    times = [9.0, 9.0, 5.0, 5.0, 5.05, 5.0, 5.0, 5.0]
    limits = WarmUp(agree_frac=0.02, max_windows=20)
    assert measure.warm_up(lambda i: times[i], 2, limits) == (4, True)
    assert measure.warm_up(lambda i: 1.1**i, 2, limits) == (20, False)


def test_a_cliff_is_seen_where_p99_lies_on_a_step():
    assert cliff([1.0] * 399) is None
    assert cliff([1.0] * 1_000) == 1
    assert cliff([1.0] * 990 + [5.0] * 10) == 5


def test_both_implementations_compute_the_same(config):
    x = inputs(config, 4)[0]
    built = [build(config, name) for name in config.implementations]
    assert [(b.seeds, b.active) for b in built] == [(4, 3), (4, 3)]
    with torch.no_grad():
        old, new = (b.model.eval()(x) for b in built)
    torch.testing.assert_close(new, old)
    # the seeds do something, or the comparison would be of two linear layers
    assert not torch.allclose(old, built[0].model[0].default_transform(x))
    for b in built:
        before = [p.detach().clone() for p in b.model.parameters()]
        b.model.train()
        b.step(x)
        assert any(not torch.equal(p, q) for p, q in zip(b.model.parameters(), before, strict=True))


def test_an_arm_measures_everything_or_says_why_not(config):
    legacy, kasmina = (
        measure.arm(Request(config=config, implementation=name)) for name in config.implementations
    )
    assert legacy.metrics.keys() == kasmina.metrics.keys()
    assert [(x.mode, x.batch, len(x.samples_us)) for x in kasmina.loops] == [
        ("forward", 1, 8), ("forward", 4, 8), ("step", 1, 4), ("step", 4, 4),
    ]  # fmt: skip
    samples = sorted(kasmina.loops[1].samples_us)
    found = kasmina.metrics["forward_b4_p50_ms"]
    assert found.value == pytest.approx(samples[3] / 1e3)
    assert found.low <= found.value <= found.high
    for name in ("forward_b1_throughput", "step_b4_mean_ms", "cpu_memory_peak_bytes",
                 "reference_ms", "seed_decisions_per_s"):  # fmt: skip
        assert kasmina.metrics[name].value > 0
    assert kasmina.metrics["active_seeds"].value == 3
    assert legacy.metrics["seed_decisions_per_s"] == absent(
        "seeds/s", "the legacy layer has no report and no controller"
    )
    if not torch.cuda.is_available():
        assert kasmina.metrics["gpu_sm_active_percent"].why == "no GPU"
        assert kasmina.metrics["forward_b1_gpu_peak_bytes"].value is None


def test_facts_are_counted_and_compared(config):
    found = measure.facts(config).facts
    assert found["dormant_changed_bits"].value == 0
    assert 0 <= found["output_max_abs_difference"].value < 1e-5
    alone = config.model_copy(update={"implementations": ("kasmina",)})
    assert measure.facts(alone).facts["output_max_abs_difference"].value is None


def test_the_machine_says_what_speed_depends_on(config):
    here = measure.Machine.here(config)
    assert here.num_cpus >= 1
    assert here.memory_bytes > 2**28
    assert here.code_hash == environment.code_hash()
    assert (here.driver is None) == (here.device == here.cpu)


def test_the_dirty_hash_follows_every_change(tmp_path):
    def git(*arguments):
        environment.subprocess.run(
            ["git", "-c", "user.name=x", "-c", "user.email=x@y", "-C", str(tmp_path), *arguments],
            check=True, capture_output=True,
        )  # fmt: skip

    git("init")
    (tmp_path / "a.py").write_text("1\n")
    git("add", "a.py")
    git("commit", "-m", "x")
    assert environment.dirty_hash(tmp_path) is None
    hashes = set()
    for name, text in (("a.py", "2\n"), ("b.py", "1\n"), ("b.py", "2\n")):
        (tmp_path / name).write_text(text)
        hashes.add(environment.dirty_hash(tmp_path))
    assert len(hashes) == 3
    assert None not in hashes
