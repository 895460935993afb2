"""The trainer: one interval of steps gives a report; actions come back in.

It decides nothing. Whoever runs it hands its reports to a controller and the controller's
actions to `apply`.
"""

import copy
import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from esper.config.run import TrainConfig
from esper.seeds.actions import Action, Rollback
from esper.seeds.lifecycle import Transition
from esper.seeds.report import Report
from esper.surgery.lattice import Lattice
from esper.training.tasks import Split, TaskData


class CollapseError(RuntimeError):
    """The loss stopped being a number; the run is recorded as collapsed, never dropped."""

    def __init__(self, step: int, what: str) -> None:
        # all arguments go to the base class so that the error survives pickling between actors
        super().__init__(step, what)
        self.step, self.what = step, what

    def __str__(self) -> str:
        return f"{self.what} at step {self.step}"


@dataclass
class Checkpoint:
    """Host, seeds, optimizer and random state in memory, from the end of a good interval."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    generators: tuple[Tensor, Tensor]
    order: Tensor


@dataclass
class Cost:
    """What training has cost so far; evaluation is not counted.

    Attributes:
        flops: Floating point operations of forward and backward passes, counted by torch on
            one step each time the topology changed, times the steps.
        seconds: Wall time of the training steps.
    """

    flops: float = 0.0
    seconds: float = 0.0
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
        self._checkpoint = self._snapshot()

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
        for _ in range(timed):
            total += self._step()
        total.item()  # waits for the device
        # counting takes longer than a step does, so that step is taken to last as the others
        self.cost.seconds += (time.perf_counter() - started) * steps / max(timed, 1)
        if timed < steps:
            total += self._counted_step()
        self.step += steps
        assert self.cost.flops_per_step is not None
        self.cost.flops += steps * self.cost.flops_per_step
        loss = float(total) / steps
        if not math.isfinite(loss):
            raise CollapseError(self.step, f"training loss {loss}")
        report = self.lattice.report(loss, self._held_out_losses)
        # a host alone has no seeds that would count the steps
        report = dataclasses.replace(report, step=self.step)
        if report.held_out_loss is not None and not math.isfinite(report.held_out_loss):
            raise CollapseError(self.step, f"held-out loss {report.held_out_loss}")
        return report

    def apply(self, actions: list[Action]) -> list[Transition]:
        """Apply a controller's actions at the end of the interval.

        A Rollback restores host, seeds, optimizer and data order as they were at the end of the
        interval before, and then marks its seed.

        Returns:
            The transitions.

        Raises:
            ValueError: As `Lattice.apply` does; nothing is changed then.
        """
        if any(isinstance(a, Rollback) for a in actions):
            self.lattice.check(actions)
            stages = {name: a.layer.states() for name, a in self.lattice.attached.items()}
            self._restore(self._checkpoint)
            # weights go back; the lifecycle does not, or the seed's failure would be forgotten
            for name, states in stages.items():
                self.lattice.layer(name).write_states(states)
            self.lattice.restart_drift()
        transitions = self.lattice.apply(actions)
        if transitions:
            self.cost.flops_per_step = None
        self._checkpoint = self._snapshot()
        return transitions

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """Metrics of one split ('train', 'held_out' or 'test') in eval mode."""
        x, y = {"train": self._train, "held_out": self._held_out, "test": self._test}[split]
        self.model.eval()
        with torch.no_grad():
            return self.data.metrics(split, self.model(x), y)

    def _held_out_losses(self) -> Tensor:
        x, y = self._held_out
        return self.data.losses(self.model(x), y)

    def _step(self) -> Tensor:
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

    def _counted_step(self) -> Tensor:
        """A training step whose floating point operations are counted."""
        with FlopCounterMode(display=False) as counter:
            loss = self._step()
        self.cost.flops_per_step = float(counter.get_total_flops())
        return loss

    def _snapshot(self) -> Checkpoint:
        return Checkpoint(
            model={k: v.detach().clone() for k, v in self.model.state_dict().items()},
            optimizer=copy.deepcopy(self.optimizer.state_dict()),
            generators=(torch.get_rng_state(), self._order_rng.get_state()),
            order=self._order,
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.model.load_state_dict(checkpoint.model)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        torch.set_rng_state(checkpoint.generators[0])
        self._order_rng.set_state(checkpoint.generators[1])
        self._order = checkpoint.order


def _make_optimizer(config: TrainConfig, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    lr, decay = config.learning_rate, config.weight_decay
    match config.optimizer:
        case "adam":
            return torch.optim.Adam(params, lr=lr, weight_decay=decay)
        case "adamw":
            return torch.optim.AdamW(params, lr=lr, weight_decay=decay)
        case "sgd":
            return torch.optim.SGD(params, lr=lr, weight_decay=decay)
