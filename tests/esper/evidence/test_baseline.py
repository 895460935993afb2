"""Baselines: real processes end to end, and verdicts on planted numbers."""

import json
import math
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from esper.config.baseline import BaselineConfig, WarmUp
from esper.evidence import baseline_stats, measure
from esper.evidence.baseline import (
    FILE,
    Baseline,
    BaselineError,
    BaselinePlan,
    places,
    read,
    run,
)
from esper.evidence.baseline_stats import (
    Outcome,
    compare,
    drift,
    effects,
    health,
    hodges_lehmann_interval,
    noise,
    quantities,
)
from esper.evidence.measure import Machine, absent, present

LOOP = {"forward": 4, "step": 2, "window": 1}
WORKLOAD = {"width": 8, "seeds_per_layer": 4, "active_seeds": 2, "batch_sizes": (1,)}
START = datetime(2026, 1, 1, tzinfo=UTC)
NOISE = 0.01
LATENCIES = ("forward_b1_mean_ms", "forward_b1_p50_ms", "forward_b1_p95_ms", "forward_b1_p99_ms",
             "step_b1_mean_ms", "step_b1_p50_ms")  # fmt: skip


def config_of(**changed):
    fields = {
        "name": "planted", "blocks": 12, "control_blocks": {"legacy": 8, "kasmina": 8},
        "workload": WORKLOAD, "requests": {"legacy": LOOP, "kasmina": LOOP},
        "warm_up": WarmUp(max_windows=3), "busy_s": 0.1,
    }  # fmt: skip
    return BaselineConfig(**fields | changed)


def plant(template, *, seed=0, factors=None, machine=None, noise=NOISE, **changed):
    """A baseline with known numbers: every metric 10, times noise, times the arm's factor."""
    rng, config = np.random.default_rng(seed), config_of(**changed)
    machine = machine or template.machine
    arms = []
    for i, place in enumerate(places(config)):
        factor = {"cpu_share_percent": 9.9} | (factors or {}).get(place.implementation, {})
        metrics = dict(template.metrics)
        for name, unit in [(n, "ms") for n in LATENCIES] + [
            ("forward_b1_throughput", "samples/s"), ("step_b1_throughput", "samples/s"),
            ("cpu_memory_peak_bytes", "bytes"), ("reference_ms", "ms"),
            ("cpu_share_percent", "percent"),
        ]:  # fmt: skip
            value = 10 * factor.get(name, 1.0) * math.exp(noise * rng.normal())
            metrics[name] = present(value, unit)
        loops = tuple(x.model_copy(update={"requests": 2_500}) for x in template.loops)
        arms.append(
            template.model_copy(
                update={
                    **place._asdict(), "metrics": metrics, "loops": loops, "machine": machine,
                    "started_at": START + timedelta(minutes=i + 1),
                    "ended_at": START + timedelta(minutes=i + 2),
                }
            )
        )  # fmt: skip
    plan = BaselinePlan(
        config=config, config_hash=config.hash, machine=machine, commit="c0de", dirty_hash=None,
        registered_at=START,
    )  # fmt: skip
    facts = {"dormant_changed_bits": present(0, "count")}
    draft = Baseline(plan=plan, arms=tuple(arms), facts=facts, lifecycle={},
                     ended_at=arms[-1].ended_at, content_hash="")  # fmt: skip
    return draft.model_copy(update={"content_hash": draft.digest()})


@pytest.fixture(scope="module")
def template():
    return measure.arm(measure.Request(config=config_of(), implementation="kasmina"))


def outcomes(found):
    return {e.metric: e.outcome for e in found}


# -- real processes


def no_growth(config):
    return {"adaptation_success_percent": absent("percent", "not asked for")}


def tree(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_baseline_is_measured_resumed_and_read_again(tmp_path):
    alone = {"implementations": ("kasmina",), "control_blocks": {"kasmina": 2}, "blocks": 2,
             "requests": {"kasmina": LOOP}}  # fmt: skip
    config, told = config_of(**alone), []
    made = run(config, tmp_path, grow=no_growth, say=told.append)
    assert "2 of 2 done" in told[-1]
    assert read(tmp_path) == made
    assert all("CPU" in reason for reason in health(made))
    assert [a.order for a in made.of("kasmina")] in ([0, 1, 0, 1], [0, 1, 1, 0],
                                                     [1, 0, 0, 1], [1, 0, 1, 0])  # fmt: skip
    assert made.facts["dormant_changed_bits"].value == 0
    assert quantities(made)["seeds_per_layer"].value == 4
    samples = json.loads((tmp_path / "arms" / "000-kasmina-a.json").read_text())["loops"]
    assert len(samples[0]["samples_us"]) == 4

    # half a block is no pair: what is left of it is measured again, the other block is not
    before = tree(tmp_path)
    (tmp_path / "arms" / "001-kasmina-b.json").unlink()
    (tmp_path / FILE).unlink()
    told.clear()
    again = run(config, tmp_path, grow=no_growth, say=told.append)
    after = tree(tmp_path)
    kept = {p.name for p in before if before[p] == after[p]}
    assert {"plan.json", "000-kasmina-a.json", "000-kasmina-b.json", "facts.json"} <= kept
    assert "001-kasmina-a.json" not in kept
    assert told[0] == "1 of 2 blocks are there already"
    assert again.plan == made.plan

    # another question is refused, and nothing changes
    before = tree(tmp_path)
    with pytest.raises(BaselineError, match="of another configuration; give a new folder"):
        run(config.model_copy(update={"seed": 1}), tmp_path, grow=no_growth)
    assert tree(tmp_path) == before


def test_a_process_that_fails_ends_the_run_with_its_own_words(tmp_path):
    config = config_of(
        implementations=("kasmina",), control_blocks={"kasmina": 2}, blocks=2,
        requests={"kasmina": LOOP}, workload=WORKLOAD | {"blueprint": "nonsense"},
    )  # fmt: skip
    with pytest.raises(BaselineError, match="must be one of noop"):
        run(config, tmp_path, grow=no_growth)
    assert not list((tmp_path / "arms").iterdir())


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(BaselineError, match="must be empty or hold a baseline's plan"):
        run(config_of(), tmp_path, grow=no_growth)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


# -- the plan


def test_controls_are_spread_and_the_order_is_random_and_reproducible():
    config = config_of(blocks=40, control_blocks={"legacy": 10, "kasmina": 40})
    planned = places(config)
    assert planned == places(config)
    twice = [p.block for p in planned if (p.implementation, p.copy_name) == ("legacy", "b")]
    assert twice == list(range(3, 40, 4))
    first = sum(p.order == 0 and p.implementation == "legacy" for p in planned)
    assert 5 < first < 35
    assert {len({p.order for p in planned if p.block == b}) for b in (0, 3)} == {3, 4}


@pytest.mark.parametrize(("changed", "message"), [
    ({"gpus": 2}, "gpus must be 1 for device 'cpu', but got 2"),
    ({"control_blocks": {"legacy": 1, "kasmina": 2}}, "control_blocks must be 2 to blocks"),
    ({"control_blocks": {"legacy": 2}}, "control_blocks must name legacy, kasmina"),
    ({"requests": {"kasmina": LOOP}}, "requests must name legacy, kasmina"),
    ({"workload": WORKLOAD | {"seeds_per_layer": 3}}, "seeds_per_layer must divide width"),
    ({"workload": WORKLOAD | {"active_seeds": 5}}, "active_seeds must be at most"),
    ({"workload": WORKLOAD | {"batch_sizes": (1, 1)}}, "batch_sizes must be given and differ"),
])  # fmt: skip
def test_a_configuration_that_makes_no_sense_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        config_of(**changed)


# -- verdicts inside one baseline


def test_a_large_effect_is_found_with_its_size_and_equal_metrics_are_not(template):
    faster = dict.fromkeys(LATENCIES[:4], 0.1)
    made = plant(template, factors={"kasmina": faster})
    found = effects(made, "kasmina", "legacy")
    by_name = outcomes(found)
    assert {by_name[n] for n in LATENCIES[:4]} == {Outcome.BETTER}
    assert by_name["step_b1_p50_ms"] is Outcome.WITHIN
    effect = next(e for e in found if e.metric == "forward_b1_p50_ms")
    assert effect.change == pytest.approx(-0.9, abs=0.005)
    assert effect.low < effect.change < effect.high
    assert quantities(made)["forward_speedup_over_legacy"].value == pytest.approx(10, rel=0.02)


def test_a_loss_of_throughput_is_worse_and_more_memory_is_worse(template):
    harm = {"forward_b1_throughput": 0.9, "cpu_memory_peak_bytes": 1.1}
    found = outcomes(effects(plant(template, factors={"kasmina": harm}), "kasmina", "legacy"))
    assert {m for m, o in found.items() if o is Outcome.WORSE} == set(harm)


def test_an_arm_against_itself_is_quiet_and_its_noise_is_measured(template):
    made = plant(template)
    found = noise(made, "kasmina")
    assert (found.pairs, found.metrics, found.alarms) == (8, 9, 0)
    assert found.family_rate <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / baseline_stats.REPETITIONS)
    assert found.family_low <= found.family_rate <= found.family_high
    assert 0.02 < found.single_rate < 0.08
    # sd of a difference is 1.4 %; 12 pairs find about one sd of it
    assert 0.007 < found.smallest["forward_b1_p50_ms"] < 0.03
    quieter = noise(plant(template, noise=NOISE / 10), "kasmina")
    assert quieter.smallest["forward_b1_p50_ms"] < found.smallest["forward_b1_p50_ms"] / 5


def test_equal_baselines_raise_an_alarm_no_more_often_than_the_rule_allows(template):
    alarms = sum(
        bool({Outcome.BETTER, Outcome.WORSE} & set(outcomes(
            effects(plant(template, seed=s), "kasmina", "legacy")).values()))
        for s in range(100)
    )  # fmt: skip
    # two sides of .025: 5 %; 13 of 100 is the upper end of the 99.9 % band
    assert alarms <= 13


def test_p99_of_few_requests_is_inconclusive_whatever_its_size(template):
    made = plant(template, factors={"kasmina": {"forward_b1_p99_ms": 0.1}})
    few = tuple(
        a.model_copy(
            update={"loops": tuple(x.model_copy(update={"requests": 400}) for x in a.loops)}
        )
        for a in made.arms
    )
    found = effects(made.model_copy(update={"arms": few}), "kasmina", "legacy")
    p99 = next(e for e in found if e.metric == "forward_b1_p99_ms")
    assert p99.outcome is Outcome.INCONCLUSIVE
    assert p99.why == "400 requests a process; at least 2500 for a verdict on P99"


def test_on_a_cliff_the_share_over_the_limit_is_judged_in_place_of_p99(template):
    made = plant(template)
    arms = tuple(
        a.model_copy(
            update={
                "loops": tuple(x.model_copy(update={"cliff": 1.4}) for x in a.loops),
                "metrics": a.metrics | {
                    "forward_b1_over_limit_percent": present(
                        3.0 * (a.implementation == "kasmina"), "percent"
                    )
                },
            }
        )
        for a in made.arms
    )  # fmt: skip
    found = effects(made.model_copy(update={"arms": arms}), "kasmina", "legacy")
    by_name = outcomes(found)
    assert "forward_b1_p99_ms" not in by_name
    assert by_name["forward_b1_over_limit_percent"] is Outcome.WORSE


def test_what_one_side_did_not_measure_is_inconclusive(template):
    made = plant(template)
    arms = tuple(
        a.model_copy(update={"metrics": a.metrics | {"forward_b1_p95_ms": absent("ms", "few")}})
        if a.implementation == "legacy" else a
        for a in made.arms
    )  # fmt: skip
    found = effects(made.model_copy(update={"arms": arms}), "kasmina", "legacy")
    p95 = next(e for e in found if e.metric == "forward_b1_p95_ms")
    assert (p95.outcome, p95.why) == (
        Outcome.INCONCLUSIVE, "12 processes did not measure it: few"
    )  # fmt: skip


@pytest.mark.parametrize(("n", "ranks"), [(6, (0, 20)), (12, (13, 64))])
def test_the_hodges_lehmann_interval_is_that_of_the_tables(n, ranks):
    """The tables give the 1st of 21 and the 14th of 78 Walsh averages for 95 %."""
    d = 2.0 ** np.arange(n)
    walsh = np.sort([(a + b) / 2 for i, a in enumerate(d) for b in d[i:]])
    assert hodges_lehmann_interval(d) == (walsh[ranks[0]], walsh[ranks[1]])
    assert hodges_lehmann_interval(d[:5]) is None


# -- health


def test_a_drift_of_the_reference_beside_one_arm_is_unhealthy(template):
    slow = plant(template, factors={"kasmina": {"reference_ms": 1.05}})
    assert "the reference workload was +" in health(slow)[0]
    assert health(plant(template)) == []


def test_a_machine_that_was_busy_with_other_things_is_unhealthy(template):
    made = plant(template, factors={"legacy": {"cpu_share_percent": 8.0}})
    assert health(made) == [
        "processes of legacy had a CPU for 80 % of the time, at least 95 % is needed: other "
        "programs ran beside them."
    ]


def test_code_that_changed_on_the_way_is_unhealthy(template):
    made = plant(template)
    other = made.arms[0].machine.model_copy(update={"code_hash": "x"})
    arms = (made.arms[0].model_copy(update={"machine": other}), *made.arms[1:])
    assert "changed between the plan" in health(made.model_copy(update={"arms": arms}))[0]


def test_processes_older_than_the_question_are_unhealthy(template):
    made = plant(template)
    late = made.plan.model_copy(update={"registered_at": START + timedelta(minutes=90)})
    assert "before the question was written down" in health(
        made.model_copy(update={"plan": late})
    )[0]  # fmt: skip


# -- two baselines


def test_a_slower_second_baseline_is_worse_and_an_equal_one_is_within(template):
    before = plant(template, seed=1)
    equal = compare(before, plant(template, seed=2))
    assert {o for c in equal for o in outcomes(c.effects).values()} == {Outcome.WITHIN}
    slow = plant(template, seed=3, factors={"kasmina": {"forward_b1_p50_ms": 1.08}})
    legacy, kasmina = compare(before, slow)
    assert outcomes(kasmina.effects)["forward_b1_p50_ms"] is Outcome.WORSE
    assert Outcome.WORSE not in outcomes(legacy.effects).values()
    assert abs(drift(before, slow)) < 0.01


@pytest.mark.parametrize(("field", "value"), [("cpu", "Z80"), ("num_cpus", 999),
                                              ("driver", "1.0"), ("max_sm_mhz", 1.0)])  # fmt: skip
def test_another_machine_class_is_refused(template, field, value):
    other = Machine(**{**template.machine.model_dump(), field: value})
    with pytest.raises(BaselineError, match=f"one machine class, but differ in {field}"):
        compare(plant(template), plant(template, machine=other))


def test_other_libraries_are_no_other_machine(template):
    versions = template.machine.versions | {"torch": "99"}
    newer = template.machine.model_copy(update={"versions": versions, "code_hash": "x"})
    assert compare(plant(template), plant(template, seed=1, machine=newer))


def test_another_configuration_is_refused(template):
    with pytest.raises(BaselineError, match="the same question, but differ in threads, limit_ms"):
        compare(plant(template), plant(template, limit_ms=50.0, threads=2))


# -- files


@pytest.mark.parametrize(("damage", "message"), [
    (lambda text: text[: len(text) // 2], "is damaged or something else"),
    (lambda text: "{}", "schema_name|plan: Field required"),
    (lambda text: '{"accuracy": 0.9}', "is damaged or something else"),
    (lambda text: text.replace("esper-baseline-1", "esper-baseline-9"), "schema_name"),
    (lambda text: text.replace('"value":10', '"value":9', 1), "does not match its hash"),
])  # fmt: skip
def test_a_corrupt_foreign_or_altered_file_is_refused(template, tmp_path, damage, message):
    path = tmp_path / "b.json"
    text = plant(template, noise=0.0).model_dump_json()
    path.write_text(text)
    assert read(path)
    path.write_text(damage(text))
    with pytest.raises(BaselineError, match=message):
        read(path)


def test_unequal_pairs_are_refused(template, tmp_path):
    made = plant(template)
    short = made.model_copy(update={"arms": made.arms[1:], "content_hash": ""})
    short = short.model_copy(update={"content_hash": short.digest()})
    (tmp_path / FILE).write_text(short.model_dump_json())
    with pytest.raises(BaselineError, match="the pairs are unequal: of 40 processes 1 are missing"):
        read(tmp_path)
