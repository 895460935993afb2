"""The trainer: one interval of steps gives a report; actions come back in.

It decides nothing. Whoever runs it hands its reports to a controller and the controller's
actions to `apply`.
"""

import copy
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from esper.config.run import Execution, TrainConfig
from esper.seeds.actions import Action, Rollback
from esper.seeds.diagnosis import finite
from esper.seeds.kasmina import KasminaLayer
from esper.seeds.lifecycle import Transition
from esper.seeds.matching import NotFiniteError
from esper.seeds.report import Report
from esper.seeds.state import GRAFTED_STAGES, SeedState, Stage
from esper.surgery.lattice import Lattice
from esper.training.snapshot import (
    MAX_SNAPSHOTS,
    Place,
    Snapshot,
    before_grafts,
    on_trial,
    still_needed,
)
from esper.training.tasks import Split, TaskData

# what a rollback adds to the reason in the log
BACK = "; back to step "


class CollapseError(RuntimeError):
    """The loss stopped being a number."""

    def __init__(self, step: int, what: str) -> None:
        # all arguments go to the base class so that the error survives pickling between actors
        super().__init__(step, what)
        self.step, self.what = step, what

    def __str__(self) -> str:
        return f"{self.what} at step {self.step}"


@dataclass
class Cost:
    """What training has cost so far; evaluation is not counted.

    Attributes:
        flops: Floating point operations of forward and backward passes, counted by torch on
            one step each time the topology changed, times the steps.
        seconds: Wall time of the training steps.
        growth_flops: Operations of measuring for new seeds and choosing their units, and of the
            held-out evaluations made for the report.
        growth_seconds: Wall time of the same.
        flops_per_step: Operations of a step as the topology is now; None: not counted yet.
    """

    flops: float = 0.0
    seconds: float = 0.0
    growth_flops: float = 0.0
    growth_seconds: float = 0.0
    flops_per_step: float | None = None


class Trainer:
    """Trains a model an interval at a time.

    Args:
        data: The task.
        model: The host; its lattice, if any, is already attached.
        lattice: The handle; for a host alone, one without sites.
        config: Optimizer and schedule.
        seed: Seed of the order of the data.
        device: Where the data is put; the model must be there.

    Raises:
        ValueError: If the batch is larger than the training set.
    """

    def __init__(
        self,
        data: TaskData,
        model: nn.Module,
        lattice: Lattice,
        config: TrainConfig,
        *,
        seed: int,
        device: str = "cpu",
    ) -> None:
        self.data, self.model, self.lattice, self.config = data, model, lattice, config
        self._train, self._held_out, self._test = (
            (x.to(device), y.to(device)) for x, y in (data.train, data.held_out, data.test)
        )
        samples = len(self._train[0])
        self._batch = config.batch_size or samples
        if self._batch > samples:
            raise ValueError(
                f"batch_size must be at most the {samples} training samples, "
                f"but got {self._batch}; lower train.batch_size."
            )
        self._order_rng = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64)
        # one optimizer for the whole run: no stage change ever rebuilds it
        self.optimizer = _make_optimizer(config, list(model.parameters()))
        self.step = 0
        self.cost = Cost()
        # counts the operations of what runs inside
        self.make_counter: Callable[[], FlopCounterMode] = partial(FlopCounterMode, display=False)
        # whether the next report is to measure places for new seeds
        self.measures = True
        # what a rollback may go back to, oldest first
        self.past: list[Snapshot] = []

    def execute(self, execution: Execution) -> None:
        """Choose how the seeds are computed from the next step on; nothing else changes."""
        for layer in self.lattice.layers():
            if layer.execution != execution:
                layer.execution = execution
                # another way to compute takes another number of operations
                self.cost.flops_per_step = None

    def run_interval(self, steps: int | None = None) -> Report:
        """Train for some steps and report.

        Args:
            steps: Optimizer steps; None: the configured interval.

        Returns:
            The lattice's report, with held-out gains of seeds in EVALUATING.

        Raises:
            CollapseError: If the loss is not finite.
        """
        steps = steps or self.config.interval_steps
        self.model.train()
        # the last step is counted, since a graft that begins now computes nothing in the first
        timed = steps - (self.cost.flops_per_step is None)
        total = torch.zeros((), device=self._train[0].device)
        started = time.perf_counter()
        for i in range(timed):
            total += self._step(self.step + i)
        total.item()  # waits for the device
        # counting takes longer than a step does, so that step is taken to last as the others
        self.cost.seconds += (time.perf_counter() - started) * steps / max(timed, 1)
        if timed < steps:
            total += self._counted_step(self.step + timed)
        self.step += steps
        assert self.cost.flops_per_step is not None
        self.cost.flops += steps * self.cost.flops_per_step
        intervals = self.lattice.interval
        try:
            report = self._report(float(total) / steps)
        except CollapseError:
            # the interval is over, though it is not worth a report
            self.lattice.interval = intervals + 1
            raise
        # a host alone has no seeds that would count the steps
        return dataclasses.replace(report, step=self.step)

    def apply(self, actions: Sequence[Action], note: Any = None) -> list[Transition]:
        """Apply a controller's actions at the end of the interval.

        Before a graft begins, everything is remembered for `roll_back`.

        Args:
            actions: Any but Rollback.
            note: What `roll_back` returns when it comes back to this moment, as JSON.

        Returns:
            The transitions.

        Raises:
            ValueError: As `Lattice.apply` does, or for a Rollback; nothing is changed then.
        """
        if any(isinstance(action, Rollback) for action in actions):
            raise ValueError(
                "actions must hold no Rollback, which undoes what others do; call `roll_back`."
            )
        grafts = any(t.after.stage is Stage.GRAFTING for t in self.lattice.check(actions))
        if grafts and len(self.past) < MAX_SNAPSHOTS:
            self.past.append(self._snapshot(note))
        with self._growing():
            transitions = self.lattice.apply(actions)
        self._changed(transitions)
        return transitions

    def suspects(self) -> list[Place]:
        """Seeds on trial, if a state is remembered in which they were not grafted."""
        return [
            place
            for place, state in (self._states() if self.past else {}).items()
            if on_trial(state, self.lattice.growth) and before_grafts(self.past, [place])
        ]

    def diverged(self) -> list[Place]:
        """Seeds in TRAINING whose own weights are no numbers any more; the host is unharmed."""
        return [
            (site, seed)
            for site, attached in self.lattice.attached.items()
            for seed in _not_finite(attached.layer, Stage.TRAINING)
        ]

    def roll_back(self, rollbacks: Sequence[Rollback]) -> Any:
        """Go back to before the first of some seeds was grafted, without them.

        Host, seeds, optimizer, random generators and order of the data become what they were.
        Steps, intervals and cost count on, and every seed whose stage changes gets a line in the
        lattice's log. Nothing is restored if none of the seeds was grafted, since they never
        touched the host then, or if no state without them is remembered.

        Args:
            rollbacks: One for each of the seeds.

        Returns:
            The note that was given to `apply` at that moment; None if nothing was restored.

        Raises:
            IllegalTransitionError: If a seed cannot be rolled back; nothing is changed then.
        """
        before = self._states()
        seeds = {(r.site, r.seed) for r in rollbacks} & _grafted(before)
        goal = before_grafts(self.past, seeds) if seeds else None
        back = "" if goal is None else f"{BACK}{goal.step}"
        marks = self.lattice.check(
            [dataclasses.replace(r, reason=f"{r.reason}{back}") for r in rollbacks]
        )
        if goal is not None:
            self._restore(goal)
            self.past = [snapshot for snapshot in self.past if snapshot.step <= goal.step]
        marked = {(t.action.site, t.action.seed): t.after for t in marks}
        after = self._states() | marked
        dormant = SeedState()
        undone = [
            self._undoing(place, was, now, back)
            for place in self._in_order({*before, *after} - set(marked))
            for was, now in [(before.get(place, dormant), after.get(place, dormant))]
            if _differ(was, now)
        ]
        for site, attached in self.lattice.attached.items():
            table = attached.layer.states()
            for (s, seed), state in marked.items():
                if s == site:
                    table[seed] = state
            attached.layer.write_states(table)
        for (site, seed), state in marked.items():
            self.lattice.layer(site).on_enter([seed], state.stage, None)
        self.lattice.log += [*marks, *undone]
        self._changed(marks)
        return None if goal is None else goal.note

    @cached_property
    def data_sha256(self) -> str:
        """Hash of all three splits: a run can only be continued with the data it began with."""
        digest = hashlib.sha256()
        for tensor in (*self.data.train, *self.data.held_out, *self.data.test):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def random_state(self) -> tuple[Tensor, ...]:
        """Torch's generator, that of the data's order, the rows left of the epoch, and the GPU's.

        The last only if the data is on a GPU; generators are uint8, rows int64.
        """
        state = torch.get_rng_state(), self._order_rng.get_state(), self._order.clone()
        device = self._train[0].device
        return (*state, torch.cuda.get_rng_state(device)) if device.type == "cuda" else state

    def set_random_state(self, state: tuple[Tensor, ...]) -> None:
        """Go on with what `random_state` returned."""
        torch.set_rng_state(state[0])
        self._order_rng.set_state(state[1])
        self._order = state[2].clone()
        if len(state) > 3:
            torch.cuda.set_rng_state(state[3], self._train[0].device)

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """Metrics of one split ('train', 'held_out' or 'test') in eval mode."""
        x, y = {"train": self._train, "held_out": self._held_out, "test": self._test}[split]
        self.model.eval()
        with torch.no_grad():
            return self.data.metrics(split, self.model(x), y)

    def outputs(self, rows: int) -> Tensor:
        """What the model says of the first held-out rows: `[rows, columns]`, fp32, on the CPU."""
        self.model.eval()
        with torch.no_grad():
            y: Tensor = self.model(self._held_out[0])
        return y.float().cpu().reshape(-1, y.shape[-1])[:rows]

    def _report(self, loss: float) -> Report:
        """The lattice's report; what measuring for new seeds takes is counted."""
        if not math.isfinite(loss):
            raise CollapseError(self.step, f"training loss {loss}")
        measured = self.lattice.growth.measured_samples
        measures = self.measures and measured and self.lattice.attached
        affordable = self._affordable_parameters()
        try:
            with self._growing() if measures else nullcontext():
                return self.lattice.report(
                    loss, self._held_out_losses, self._measured_loss if measures else None,
                    affordable,
                )  # fmt: skip
        except NotFiniteError as error:
            raise CollapseError(self.step, str(error)) from error

    def _affordable_parameters(self) -> int | None:
        """Parameters with which the steps that are left fit the budget of operations."""
        budget = self.lattice.growth.max_train_flops
        if budget is None:
            return None
        now, left = self.lattice.count_parameters(), self.config.steps - self.step
        each = self.cost.flops_per_step
        if not left or not each:
            return now
        return max(0, int(now * (budget - self.cost.flops - self.cost.growth_flops) / left / each))

    @contextmanager
    def _growing(self) -> Iterator[None]:
        """Counts what is done inside as a part of growth."""
        started = time.perf_counter()
        with self.make_counter() as counter:
            yield
        self.cost.growth_flops += float(counter.get_total_flops())
        self.cost.growth_seconds += time.perf_counter() - started

    def _measured_loss(self) -> Tensor:
        x, y = self._train
        # a function of the step, so that neither the data's order nor a resumed run sees a change
        drawn = torch.Generator().manual_seed(self.step)
        rows = torch.randperm(len(x), generator=drawn)[: self.lattice.growth.measured_samples]
        rows = rows.to(x.device)
        return self.data.losses(self.model(x[rows]), y[rows]).mean()

    def _held_out_losses(self) -> Tensor:
        x, y = self._held_out
        losses = self.data.losses(self.model(x), y)
        mean = float(losses.mean())
        # at once, since nothing else can be measured on such a model
        if not math.isfinite(mean):
            raise CollapseError(self.step, f"held-out loss {mean}")
        return losses

    def _step(self, step: int) -> Tensor:
        rate = self.config.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        x, y = self._next_batch()
        self.optimizer.zero_grad()
        loss = self.data.losses(self.model(x), y).mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _next_batch(self) -> Split:
        x, y = self._train
        if self._batch == len(x):
            return x, y
        # a batch may reach into the next epoch, so that every batch has the same size
        while len(self._order) < self._batch:
            epoch = torch.randperm(len(x), generator=self._order_rng)
            self._order = torch.cat([self._order, epoch])
        rows, self._order = self._order[: self._batch], self._order[self._batch :]
        rows = rows.to(x.device)
        return x[rows], y[rows]

    def _counted_step(self, step: int) -> Tensor:
        """A training step whose floating point operations are counted."""
        with self.make_counter() as counter:
            loss = self._step(step)
        self.cost.flops_per_step = float(counter.get_total_flops())
        return loss

    def _states(self) -> dict[Place, SeedState]:
        """The state of every seed that is not dormant."""
        tables = {site: a.layer.states() for site, a in self.lattice.attached.items()}
        return {
            (site, seed): table[seed]
            for site, table in tables.items()
            for seed in table.seeds_in(set(Stage) - {Stage.DORMANT})
        }

    def _in_order(self, places: Collection[Place]) -> list[Place]:
        """Some places as the lattice has its sites, and by seed."""
        sites = list(self.lattice.attached)
        return sorted(places, key=lambda place: (sites.index(place[0]), place[1]))

    def _undoing(self, place: Place, before: SeedState, after: SeedState, back: str) -> Transition:
        """The line of the log for a seed that went back with the run."""
        action = Rollback(*place, f"undone{back}")
        return Transition(self.lattice.interval, self.lattice.steps, action, before, after)

    def _changed(self, transitions: Sequence[Transition]) -> None:
        if transitions:
            self.cost.flops_per_step = None
        if self.past:
            growth = self.lattice.growth
            trials = [place for place, s in self._states().items() if on_trial(s, growth)]
            self.past = still_needed(self.past, trials)

    def _snapshot(self, note: Any) -> Snapshot:
        return Snapshot(
            step=self.step,
            model={k: v.detach().clone() for k, v in self.model.state_dict().items()},
            optimizer=copy.deepcopy(self.optimizer.state_dict()),
            random=self.random_state(),
            signals=self.lattice.signals,
            grad_norms=self.lattice.grad_norms,
            grafted=_grafted(self._states()),
            note=note,
        )

    def _restore(self, snapshot: Snapshot) -> None:
        self.model.load_state_dict(snapshot.model)
        # a copy: the optimizer would go on to change the snapshot's own tensors
        self.optimizer.load_state_dict(copy.deepcopy(snapshot.optimizer))
        self.set_random_state(snapshot.random)
        self.lattice.signals, self.lattice.grad_norms = snapshot.signals, snapshot.grad_norms
        for layer in self.lattice.layers():
            layer.reset_telemetry()
        self.lattice.restart_drift()


def _grafted(states: Mapping[Place, SeedState]) -> frozenset[Place]:
    return frozenset(place for place, s in states.items() if s.stage in GRAFTED_STAGES)


def _not_finite(layer: KasminaLayer, stage: Stage) -> list[int]:
    seeds = layer.states().seeds_in({stage})
    # asked together, since shards may have to ask each other
    sound = finite(layer).tolist() if seeds else []
    return [i for i in seeds if not sound[i]]


def _differ(a: SeedState, b: SeedState) -> bool:
    """Whether more than the time in the stage has changed."""
    return dataclasses.replace(a, epochs=0) != dataclasses.replace(b, epochs=0)


def _make_optimizer(config: TrainConfig, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    lr, decay = config.learning_rate, config.weight_decay
    match config.optimizer:
        case "adam":
            return torch.optim.Adam(params, lr=lr, weight_decay=decay)
        case "adamw":
            return torch.optim.AdamW(params, lr=lr, weight_decay=decay)
        case "sgd":
            return torch.optim.SGD(params, lr=lr, weight_decay=decay)
