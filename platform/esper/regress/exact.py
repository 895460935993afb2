"""What must agree exactly: lifecycle, streams of random numbers, decisions, untouched bits.

Each is held against an independent statement of what is right: a second table of moves, a plain
loop over a generator with a stored digest, the same report decided twice.
"""

import copy
import hashlib
import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from esper.config.run import Execution, RunConfig
from esper.controller.base import remind
from esper.controller.contract import without_reasons
from esper.evidence.records import Fingerprint
from esper.regress.finding import Finding, capped, changed_bits
from esper.seeds import legacy, lifecycle
from esper.seeds.actions import Action, Advance, Cancel, Cull, Germinate, Promote, Rollback
from esper.seeds.blueprints import BLUEPRINTS, Geometry
from esper.seeds.grafting import GRAFTS
from esper.seeds.kasmina import KasminaLayer
from esper.seeds.state import SeedState, Stage
from esper.surgery.attach import attach
from esper.trial import Trial, TrialSpec

EXECUTIONS: tuple[Execution, ...] = get_args(Execution)
GEOMETRIES: tuple[Geometry, ...] = get_args(Geometry)
MARK = Fingerprint(code_hash="none", commit=None, versions={}, device="any")

# the moves once more, by name, as the design's table of stages states them
_NEXT = {
    "DORMANT": {"Germinate": "GERMINATED"},
    "GERMINATED": {"Promote": "TRAINING", "Cancel": "CANCELLED"},
    "TRAINING": {
        "Advance": "GRAFTING", "Cull": "CULLED", "Cancel": "CANCELLED", "Rollback": "ROLLED_BACK",
    },
    "GRAFTING": {"Advance": "STABILIZATION", "Cull": "CULLED", "Rollback": "ROLLED_BACK"},
    "STABILIZATION": {"Advance": "EVALUATING", "Rollback": "ROLLED_BACK"},
    "EVALUATING": {"Advance": "FINE_TUNING", "Cull": "CULLED", "Rollback": "ROLLED_BACK"},
    "FINE_TUNING": {"Advance": "FOSSILIZED", "Cull": "CULLED", "Rollback": "ROLLED_BACK"},
    "FOSSILIZED": {},
    "CULLED": {"Advance": "DORMANT"},
    "CANCELLED": {"Advance": "DORMANT"},
    "ROLLED_BACK": {"Advance": "DORMANT"},
}  # fmt: skip
# and the five stages of the old interface
_FIVE = {
    "DORMANT": "DORMANT", "GERMINATED": "LOADING", "TRAINING": "LOADING", "GRAFTING": "LOADING",
    "STABILIZATION": "ACTIVE", "EVALUATING": "ACTIVE", "FINE_TUNING": "ACTIVE",
    "FOSSILIZED": "FOSSILIZED", "CULLED": "ERROR_RECOVERY", "CANCELLED": "DORMANT",
    "ROLLED_BACK": "ERROR_RECOVERY",
}  # fmt: skip
_FULL = {"STABILIZATION", "EVALUATING", "FINE_TUNING", "FOSSILIZED"}
_SIMPLE: tuple[type[Action], ...] = (Promote, Advance, Cull, Cancel, Rollback)
# sha256 of the first 100,000 numbers of seed 0, as doubles: another generator, another run
STREAM_SHA256 = "a8c0025b6608e4793b353bf5fa565a793a101a25b80be5aff1cd80a50be08838"


class _Command(NamedTuple):
    """An action, the seed's state before it, the one that is right after it, and all of them."""

    action: Action
    before: SeedState
    wanted: SeedState | None
    states: tuple[SeedState, ...]
    renewed: bool


def _expected(state: SeedState, action: Action) -> SeedState | None:
    """The state after an action; None if the table does not allow it."""
    name = _NEXT[state.stage.name].get(type(action).__name__)
    if name is None:
        return None
    if isinstance(action, Germinate):
        ids = list(BLUEPRINTS).index(action.blueprint), list(GRAFTS).index(action.graft)
        return SeedState(Stage[name], ids[0], 0, ids[1])
    if name == "DORMANT":
        return SeedState()
    return SeedState(Stage[name], state.blueprint_id, 0, state.graft_id)


def _commands(
    steps: int, site: str, seeds: int, kinds: Sequence[int], grafts: Sequence[str]
) -> Iterator[_Command]:
    """Random commands, most of them legal, so that late stages are reached often.

    What is sent back is the state that the table demands. A fossilised seed is replaced by a
    dormant one now and then, or all would end so.
    """
    rng, states = np.random.default_rng(0), [SeedState()] * seeds
    every = [*(kind.__name__ for kind in _SIMPLE), "Germinate"]
    for _ in range(steps):
        seed = int(rng.integers(seeds))
        before = states[seed]
        legal = list(_NEXT[before.stage.name])
        # the first is the main path
        names = (legal[:1], legal, every, every)[int(rng.integers(4))] or every
        name = names[int(rng.integers(len(names)))]
        if name == "Germinate":
            blueprint = tuple(BLUEPRINTS)[kinds[int(rng.integers(len(kinds)))]]
            graft = grafts[int(rng.integers(len(grafts)))]
            action: Action = Germinate(site, seed, blueprint, graft)
        else:
            action = next(kind for kind in _SIMPLE if kind.__name__ == name)(site, seed)
        wanted = _expected(before, action)
        states[seed] = wanted or before
        renewed = states[seed].stage is Stage.FOSSILIZED and rng.random() < 0.3
        yield _Command(action, before, wanted, tuple(states), renewed)
        if renewed:
            states[seed] = SeedState()


def _uncovered(seen: set[tuple[str, str]]) -> list[str]:
    every = [*(kind.__name__ for kind in _SIMPLE), "Germinate"]
    return [
        f"{name} was never commanded in {stage}"
        for stage in _NEXT
        for name in every
        if (stage, name) not in seen
    ]


def transitions(steps: int) -> Finding:
    """Random commands to 64 seeds, legal or not, against the second table of moves."""
    problems, accepted, moved = list[str](), 0, 0
    seen = set[tuple[str, str]]()
    for command in _commands(steps, "site", 64, range(len(BLUEPRINTS)), tuple(GRAFTS)):
        action, before, wanted = command.action, command.before, command.wanted
        seen.add((before.stage.name, type(action).__name__))
        try:
            got: SeedState | None = lifecycle.advance(before, action)
        except lifecycle.IllegalTransitionError:
            got = None
        if got != wanted:
            accepted += wanted is None
            problems.append(f"{type(action).__name__} in {before}: {got}, not {wanted}")
        moved += wanted is not None
    problems += _uncovered(seen)
    return Finding(
        capped(problems), steps,
        {"illegal_transitions_accepted": (accepted, "count")},
        (f"{moved} of {steps} commands were legal",),
    )  # fmt: skip


def commanded_lattice(steps: int) -> Finding:
    """The same on a lattice: the state tensor and alpha follow, and a refusal changes nothing."""
    problems, seen, asked = list[str](), set[tuple[str, str]](), 0
    lattice = attach(nn.Sequential(nn.Linear(4, 16)), "0", seeds_per_layer=8, hidden=2)
    layer = lattice.layer("0")
    fitting = [i for i, name in enumerate(BLUEPRINTS) if _fits(name, layer)]
    # other grafts are paced by what only training measures
    for command in _commands(steps, "0", 8, fitting, ["linear"]):
        action, wanted, states = command.action, command.wanted, list(command.states)
        asked += 1
        seen.add((command.before.stage.name, type(action).__name__))
        try:
            lattice.apply([action])
            refused = False
        except lifecycle.IllegalTransitionError:
            refused = True
        if refused != (wanted is None) or list(layer.states()) != states:
            problems.append(f"{action}: refused {refused}, {layer.states()[action.seed]}")
            break
        alphas = zip(layer.alpha.tolist(), states, strict=True)
        if any(a != (s.stage.name in _FULL) for a, s in alphas if s.stage is not Stage.GRAFTING):
            problems.append(f"{action}: alpha {layer.alpha.tolist()} does not fit {states}")
            break
        if command.renewed:
            states[action.seed] = SeedState()
            layer.write_states(states)
            layer.on_enter([action.seed], Stage.DORMANT, None)
    return Finding(capped(problems or _uncovered(seen)), asked)


def _fits(name: str, layer: KasminaLayer) -> bool:
    try:
        BLUEPRINTS[name].require(layer.geometry, layer.hidden)
    except ValueError:
        return False
    return True


def legacy_stages() -> Finding:
    """The five old stages are what the eleven map onto, each as the design says."""
    found = {stage.name: legacy.LEGACY_STAGE[stage].name for stage in legacy.LEGACY_STAGE}
    problems = [
        f"{name} is {found.get(name, 'missing')}, not {old}"
        for name, old in _FIVE.items()
        if found.get(name) != old
    ]
    problems += [f"{s.name} is a stage that nobody knows" for s in Stage if s.name not in _FIVE]
    return Finding(capped(problems), len(_FIVE), {"lifecycle_stages": (float(len(Stage)), "count")})


def streams(draws: int) -> Finding:
    """The generator's numbers, the weights of new seeds, and the order of the data.

    Args:
        draws: Numbers; the stored digest is of 100,000, and is checked from there on.
    """
    problems, drawn = [], torch.rand(
        100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )  # fmt: skip
    digest = hashlib.sha256(drawn.numpy().tobytes()).hexdigest()
    if digest != STREAM_SHA256:
        problems.append(f"torch's generator gives {digest[:16]}, not {STREAM_SHA256[:16]}")
    per_seed = 3 * 4 + 4 + 4 * 3
    seeds = -(-draws // per_seed)
    layers = {e: KasminaLayer(3 * seeds, seeds, hidden=4, execution=e) for e in EXECUTIONS}
    generators = {e: torch.Generator().manual_seed(7) for e in layers}
    plain = torch.Generator().manual_seed(7)
    for layer in layers.values():
        layer.hidden_used.fill_(4)
    for seed in range(seeds):
        wanted = [
            ((2 * torch.rand(shape, generator=plain, dtype=torch.float64) - 1) / math.sqrt(fan))
            for shape, fan in (((3, 4), 3), ((4,), 3), ((4, 3), 4))
        ]
        for execution, layer in layers.items():
            layer.initialise({seed: generators[execution]}, outgoing=True)
            for mine, theirs in zip(layer.pool(), wanted, strict=True):
                if changed_bits(mine[seed], theirs.float()):
                    problems.append(f"seed {seed} under '{execution}' has other weights")
    ends = {(g, e): _ended(g, e) for g in GEOMETRIES for e in EXECUTIONS}
    for (geometry, execution), end in ends.items():
        if not all(map(torch.equal, end, ends[geometry, "loop"])):
            problems.append(f"'{execution}' leaves other {geometry} streams than the loop")
    return Finding(capped(problems), 100_000 + seeds * per_seed * len(layers) + len(ends))


def tiny_run(geometry: Geometry, **changes: object) -> RunConfig:
    """A growing run of a second on the two spirals, with seeds of one geometry."""
    sites = {
        "chunk": {"sites": "fc1", "seeds_per_layer": 4, "hidden": 4},
        "span": {"sites": "fc1->out", "seeds_per_layer": 4, "geometry": "span"},
    }
    return RunConfig.model_validate(
        {
            "task": {
                "name": "spirals",
                "options": {"train_samples": 200, "held_out_samples": 100, "test_samples": 200},
            },
            "host": {"name": "mlp", "options": {"hidden": [8]}},
            "train": {"steps": 160, "batch_size": 50, "interval_steps": 10, "learning_rate": 0.01},
            "lattice": [sites[geometry]],
            "growth": {
                "ramp_steps": 8, "fine_tuning_intervals": 2, "min_gain": -1e9,
                "min_explained_frac": -1e9, "max_instability_frac": 1e9, "max_drift_frac": 1e9,
            },
            "controller": {
                "name": "tamiyo",
                "options": {
                    "patience_intervals": 1, "min_improvement_frac": 0.9, "seeds_per_wave": 2,
                },
            },
        }
        | changes
    )  # fmt: skip


def trial(config: RunConfig, seed: int) -> Trial:
    """A trial of its own, of no sweep."""
    return Trial(config, TrialSpec("regress", 0, seed, 0, "none", MARK))


def grafted(run: Trial) -> bool:
    """Whether a run ever blended a seed in; one that did not compares nothing."""
    return any(t.after.stage is Stage.GRAFTING for t in run.trainer.lattice.log)


def _ended(geometry: Geometry, execution: Execution) -> tuple[Tensor, ...]:
    run = trial(tiny_run(geometry, execution=execution), 3)
    for _ in range(8):
        run.run_for(0.0)
    if not grafted(run):
        raise RuntimeError(f"no seed of the {geometry} run was ever grafted; nothing is compared.")
    return run.trainer.random_state()


def decisions(runs: int) -> Finding:
    """Tamiyo on the report of either implementation, from one state; and twice on the same one.

    Before every interval the parallel run's model, optimizer and generators are given to the legacy
    one, so that their reports differ by the rounding of one interval and by nothing else.
    """
    problems, idle, made, asked = list[str](), list[str](), 0, 0
    for seed in range(runs):
        geometry = GEOMETRIES[seed % 2]
        new, old = (trial(tiny_run(geometry, execution=e), seed) for e in ("kernels", "loop"))
        for _ in range(new.intervals):
            old.trainer.model.load_state_dict(new.trainer.model.state_dict())
            old.trainer.optimizer.load_state_dict(copy.deepcopy(new.trainer.optimizer.state_dict()))
            old.trainer.set_random_state(new.trainer.random_state())
            reports = new.trainer.run_interval(), old.trainer.run_interval()
            memory = copy.deepcopy(new.controller.state_dict())
            first = new.controller.decide(reports[0])
            other = old.controller.decide(reports[1])
            after = copy.deepcopy(new.controller.state_dict())
            new.controller.load_state_dict(memory)
            again = new.controller.decide(reports[0])
            asked, made = asked + 1, made + len(first)
            if without_reasons(first) != without_reasons(other):
                problems.append(f"run {seed}, step {reports[0].step}: legacy decides otherwise")
            if first != again or new.controller.state_dict() != after:
                problems.append(f"run {seed}, step {reports[0].step}: not the same when replayed")
            new.trainer.apply(first)
            old.trainer.apply(first)
            remind(old.controller._controller, new.controller.memory())
        if not grafted(new):
            idle.append(f"run {seed}: no seed was ever grafted, so nothing was compared")
    return Finding(
        capped(problems + idle), asked,
        {"replayed_decisions_differing": (len(problems), "count")},
        (f"{made} decisions on {asked} reports",),
    )  # fmt: skip


def dormant() -> Finding:
    """A sleeping lattice changes no bit of the host's output and gradient, whatever it holds."""
    bits, cases, problems = 0, 0, list[str]()
    stages: tuple[Stage | str, ...] = (
        Stage.DORMANT, Stage.GERMINATED, Stage.TRAINING, Stage.CULLED, "one awake",
    )  # fmt: skip
    dtypes = torch.float32, torch.bfloat16, torch.float64
    for geometry, execution, dtype, stage in product(GEOMETRIES, EXECUTIONS, dtypes, stages):
        for parts in _untouched(geometry, execution, dtype, stage):
            changed = changed_bits(*parts)
            cases, bits = cases + 1, bits + changed
            if changed:
                problems.append(f"{geometry}, {execution}, {dtype}, {stage}: {changed} bits")
    return Finding(capped(problems), cases, {"dormant_changed_bits": (bits, "count")})


def _untouched(
    geometry: Geometry, execution: Execution, dtype: torch.dtype, stage: Stage | str
) -> Iterator[tuple[Tensor, Tensor]]:
    """What a pass gives where all seeds sleep, beside what went in."""
    torch.manual_seed(5)
    layer = KasminaLayer(
        12, 4, geometry=geometry, in_features=3 if geometry == "span" else None, execution=execution
    )
    asleep = Stage.DORMANT if isinstance(stage, str) else stage
    relu = list(BLUEPRINTS).index("mlp_relu")
    states = [SeedState(asleep, relu)] * 4
    awake = isinstance(stage, str) and geometry == "chunk"
    if awake:
        states[0] = SeedState(Stage.FINE_TUNING, relu)
    layer.write_states(states)
    with torch.no_grad():
        for weights in layer.pool():
            weights.fill_(math.nan)
            if awake:
                weights[0].normal_()
        layer.alpha[0] = float(awake)
    x = torch.randn(6, 12).to(dtype).requires_grad_()
    source = torch.randn(6, 3).to(dtype) if geometry == "span" else None
    dy = torch.randn(6, 12).to(dtype)
    for training in (True, False):
        layer.train(training)
        x.grad = None
        y = layer(x * 1, source)
        y.backward(dy)
        assert x.grad is not None
        still = slice(3, None) if awake else slice(None)
        yield y[:, still], x[:, still]
        yield x.grad[:, still], dy[:, still]


def rollback() -> Finding:
    """A graft that is rolled back leaves model, optimizer and generators as they were, bit for bit.

    Nothing of the seed that is given up counts: its weights are no part of the model any more.
    """
    bits, cases = 0, 0
    for geometry, execution in product(GEOMETRIES, EXECUTIONS):
        run = trial(tiny_run(geometry, execution=execution, controller={"name": "static"}), 0)
        trainer, site = run.trainer, next(iter(run.trainer.lattice.attached))
        trainer.apply([Germinate(site, 0, "mlp_relu")])
        trainer.apply([Promote(site, 0)])
        trainer.run_interval()
        before = _everything(run, site)
        trainer.apply([Advance(site, 0)])
        trainer.run_interval()
        trainer.run_interval()
        trainer.roll_back([Rollback(site, 0)])
        for now, then in zip(_everything(run, site), before, strict=True):
            bits, cases = bits + changed_bits(now, then), cases + 1
    problems = (f"{bits} bits differ after a rollback",) if bits else ()
    return Finding(problems, cases, {"rollback_changed_bits": (bits, "count")})


def _everything(run: Trial, site: str) -> list[Tensor]:
    trainer = run.trainer
    pool = {id(w) for a in trainer.lattice.attached.values() for w in a.layer.pool()}
    host = [p for p in trainer.model.parameters() if id(p) not in pool]
    moments = [v for p in host for v in trainer.optimizer.state[p].values()]
    others = [w[1:] for w in trainer.lattice.layer(site).pool()]
    return [t.detach().clone() for t in (*host, *moments, *others, *trainer.random_state())]
