"""Tasks: data, loss and metrics. Every task is generated or ships with a package.

A task is a pydantic model of its options with one method, `load(seed)`. Held-out data is for
decisions during the run; test data is for the final metrics alone.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from esper.config.base import Config
from esper.registry import Registry

Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TaskData:
    """Everything a trainer needs of a task.

    Attributes:
        train: Inputs `[N, ...]` fp32 and targets `[N]` int64 or `[N, K]` fp32.
        held_out: For decisions while training.
        test: For the final metrics.
        kind: Classification (cross-entropy, accuracy) or regression (mean squared error).
        inputs: Features of one input.
        outputs: Outputs the host must have.
    """

    train: Split
    held_out: Split
    test: Split
    kind: Literal["classification", "regression"]
    inputs: int
    outputs: int

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each sample, `[N]`: nats, or the mean square over the outputs."""
        if self.kind == "classification":
            return F.cross_entropy(outputs, targets, reduction="none")
        if outputs.shape != targets.shape:
            raise ValueError(
                f"the host's outputs must have the targets' shape {tuple(targets.shape)}, "
                f"but have {tuple(outputs.shape)}; change the host."
            )
        return (outputs - targets).square().flatten(1).mean(1)

    def metrics(self, name: str, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Metrics of one split, named `<name>_loss` and so on; accuracy is a share in [0, 1]."""
        metrics = {f"{name}_loss": float(self.losses(outputs, targets).mean())}
        if self.kind == "classification":
            hits = outputs.argmax(-1) == targets
            metrics[f"{name}_accuracy"] = float(hits.double().mean())
        return metrics


class Task(Config):
    """Options of a task; subclasses add their own and `load`."""

    data_seed: NonNegativeInt | None = Field(
        None, description="Seed of the data; None: the seed of the pair."
    )
    kind: ClassVar[Literal["classification", "regression"]] = "classification"

    def load(self, seed: int) -> TaskData:
        """Make the data.

        Args:
            seed: Seed of the pair, used unless `data_seed` is set.
        """
        raise NotImplementedError(f"{type(self).__name__} must define load(seed).")

    def rng(self, seed: int, split: int) -> np.random.Generator:
        """Generator of one split; the same split of the same seed is always the same."""
        base = seed if self.data_seed is None else self.data_seed
        return np.random.default_rng([base, split])


TASKS: Registry[type[Task]] = Registry("task")


@TASKS.register("spirals")
class Spirals(Task):
    """Two interleaved spirals; radius spread so that the density is even."""

    train_samples: PositiveInt = Field(2000, description="Samples to train on.")
    held_out_samples: PositiveInt = Field(1000, description="Samples that growth is judged by.")
    test_samples: PositiveInt = Field(
        2000, description="Samples that nothing but the final metrics sees."
    )
    turns: PositiveFloat = Field(1.75, description="Turns of each spiral.")
    noise: float = Field(0.02, ge=0, description="Standard deviation; the outer radius is 1.")

    def load(self, seed: int) -> TaskData:
        """Points `[N, 2]` and classes `[N]`; test data is drawn apart from the training data."""
        sizes = (self.train_samples, self.held_out_samples, self.test_samples)
        train, held, test = (
            self._draw(n, self.rng(seed, split)) for n, split in zip(sizes, (0, 2, 1), strict=True)
        )
        return TaskData(train, held, test, "classification", 2, 2)

    def _draw(self, samples: int, rng: np.random.Generator) -> Split:
        radius = np.sqrt(rng.random(samples))
        label = rng.integers(0, 2, samples)
        angle = 2 * np.pi * self.turns * radius + np.pi * label
        points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        points += rng.normal(0, self.noise, points.shape)
        return _tensors(points, label)


@TASKS.register("moons")
class Moons(Task):
    """Scikit-learn's two moons, with noise that no network can see through."""

    train_samples: PositiveInt = Field(1000, description="Samples to train on.")
    held_out_samples: PositiveInt = Field(1000, description="Samples that growth is judged by.")
    test_samples: PositiveInt = Field(
        2000, description="Samples that nothing but the final metrics sees."
    )
    noise: float = Field(0.3, ge=0, description="Standard deviation; a moon's radius is 1.")

    def load(self, seed: int) -> TaskData:
        """Points `[N, 2]` and classes `[N]`, half of each class."""
        from sklearn.datasets import make_moons

        sizes = (self.train_samples, self.held_out_samples, self.test_samples)
        train, held, test = (
            _tensors(*make_moons(
                n, noise=self.noise, random_state=int(self.rng(seed, split).integers(2**31))
            ))
            for n, split in zip(sizes, (0, 2, 1), strict=True)
        )  # fmt: skip
        return TaskData(train, held, test, "classification", 2, 2)


@TASKS.register("digits")
class Digits(Task):
    """The 8 x 8 digits that ship with scikit-learn, scaled to [0, 1]."""

    held_out_frac: float = Field(
        0.1, gt=0, lt=0.5, description="Share of the training images kept for decisions."
    )

    def load(self, seed: int) -> TaskData:
        """1,347 training images less the held-out ones, 450 test images, stratified."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        x, y = load_digits(return_X_y=True)
        base = seed if self.data_seed is None else self.data_seed
        x_fit, x_test, y_fit, y_test = train_test_split(
            x / 16, y, test_size=450, stratify=y, random_state=base
        )
        return _carve(x_fit, y_fit, x_test, y_test, self.held_out_frac, self.rng(seed, 2), 10)


@TASKS.register("mnist1d")
class Mnist1d(Task):
    """MNIST-1D with its default arguments, generated by the package `mnist1d`."""

    held_out_frac: float = Field(
        0.1, gt=0, lt=0.5, description="Share of the training samples kept for decisions."
    )

    def load(self, seed: int) -> TaskData:
        """4,000 training samples less the held-out ones, 1,000 test samples, `[N, 40]`."""
        from mnist1d.data import get_dataset_args, make_dataset

        args = get_dataset_args()
        args.seed = seed if self.data_seed is None else self.data_seed
        data = make_dataset(args)
        return _carve(
            data["x"], data["y"], data["x_test"], data["y_test"],
            self.held_out_frac, self.rng(seed, 2), 10,
        )  # fmt: skip


@TASKS.register("teacher_student")
class TeacherStudent(Task):
    """Regression on a random ReLU teacher (Evci et al., "GradMax", ICLR 2022)."""

    kind: ClassVar[Literal["classification", "regression"]] = "regression"
    train_samples: PositiveInt = Field(1000, description="Samples to train on.")
    held_out_samples: PositiveInt = Field(1000, description="Samples that growth is judged by.")
    inputs: PositiveInt = Field(10, description="Inputs of the teacher.")
    hidden: PositiveInt = Field(10, description="Hidden units of the teacher.")
    outputs: PositiveInt = Field(10, description="Outputs of the teacher.")

    def load(self, seed: int) -> TaskData:
        """Inputs N(0, 1), targets of a teacher without bias and with weights U(-1, 1)."""
        rng = self.rng(seed, 3)
        w1 = rng.uniform(-1, 1, (self.inputs, self.hidden))
        w2 = rng.uniform(-1, 1, (self.hidden, self.outputs))

        def draw(samples: int, split: int) -> Split:
            x = self.rng(seed, split).normal(size=(samples, self.inputs))
            return _tensors(x, np.maximum(x @ w1, 0) @ w2)

        train = draw(self.train_samples, 0)
        held, test = draw(self.held_out_samples, 2), draw(self.held_out_samples, 1)
        return TaskData(train, held, test, "regression", self.inputs, self.outputs)


def _tensors(x: np.ndarray, y: np.ndarray) -> Split:
    target = torch.as_tensor(np.asarray(y))
    target = target.float() if target.is_floating_point() else target.long()
    return torch.as_tensor(np.ascontiguousarray(x)).float(), target


def _carve(
    x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray,
    held_out_frac: float, rng: np.random.Generator, classes: int,
) -> TaskData:  # fmt: skip
    """Keep a random share of the training data for decisions; every arm trains on the rest."""
    order = rng.permutation(len(x))
    cut = math.ceil(len(x) * held_out_frac)
    held, fit = order[:cut], order[cut:]
    return TaskData(
        _tensors(x[fit], y[fit]), _tensors(x[held], y[held]), _tensors(x_test, y_test),
        "classification", x.shape[1], classes,
    )  # fmt: skip
