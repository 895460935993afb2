"""Data-parallel training: every replica has the whole model and its part of each batch.

Gradients are averaged while the backward pass goes on (`esper.shards.averaging`), the loss and the
telemetry before they are reported, so that all replicas take the same step and tell the same. What
is evaluated or measured on a fixed set of samples is computed by each replica alone: the same
everywhere.

The mean of the replicas' gradients is that of the whole batch. For seeds that learn alone, whose
objective is a quotient of two sums over the batch, replicas tell each other those sums in every
backward pass, a few numbers a site. Hosts that draw random numbers in their forward pass draw the
same ones on every replica, each for its own part.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from esper.seeds import telemetry
from esper.seeds.report import Report
from esper.shards.averaging import Averaging
from esper.shards.errors import ShardLostError
from esper.training.tasks import Split
from esper.training.trainer import Trainer
from esper_kernels import across


@dataclass(frozen=True)
class Replica:
    """One of several.

    Attributes:
        rank: Which, from 0.
        count: Of how many.
        address: Where they meet: `tcp://host:port`, served by rank 0.
        timeout_s: How long they wait for each other.
        bucket_bytes: Gradients in one message, unless one alone is larger.
    """

    rank: int
    count: int
    address: str
    timeout_s: float
    bucket_bytes: int

    def join(self, device: str) -> None:
        """Meet the others; once a process. NCCL between GPUs, gloo between CPUs."""
        dist.init_process_group(
            "nccl" if torch.device(device).type == "cuda" else "gloo",
            init_method=self.address,
            rank=self.rank,
            world_size=self.count,
            timeout=timedelta(seconds=self.timeout_s),
        )

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all replicas, the same bits on each, in place.

        Raises:
            ShardLostError: If another replica does not answer.
        """
        self.start_sum(tensor).wait()
        return tensor.div_(self.count)

    def start_sum(self, tensor: Tensor) -> "Sum":
        """Begin to sum over all replicas, in place; the same bits on each.

        Raises:
            ShardLostError: If another replica does not answer, now or when it is waited for.
        """
        with _telling(self.rank):
            work = dist.all_reduce(tensor, async_op=True)
        return Sum(self.rank, work)


@dataclass(frozen=True)
class Sum:
    """A sum on its way.

    Attributes:
        rank: Of the replica that waits for it.
        work: Of torch.
    """

    rank: int
    work: Any

    def wait(self) -> None:
        """Until the tensor holds it; on a GPU, until what is computed next would see it.

        Raises:
            ShardLostError: If another replica does not answer.
        """
        with _telling(self.rank):
            self.work.wait()


@contextmanager
def _telling(rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ShardLostError((rank,), f"lost touch with the others: {error}") from error


def is_lost_touch(error: BaseException) -> bool:
    """Whether others did not answer, in a reduction of ours or one that torch made."""
    # gloo has no class of its own
    return isinstance(error, ShardLostError | dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


class ReplicaTrainer(Trainer):
    """A trainer that sees one part of each batch and takes the step of the whole.

    Args:
        *args: As for `Trainer`.
        replica: Which part.
        **kwargs: As for `Trainer`.

    Raises:
        ValueError: If the batch cannot be cut into equal parts, or the host normalises over it.
    """

    def __init__(self, *args: Any, replica: Replica, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._replica = replica
        if self._batch % replica.count:
            raise ValueError(
                f"batch_size must be a multiple of the {replica.count} shards, "
                f"but got {self._batch}; change one of them."
            )
        for name, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise ValueError(
                    "host must not normalise over the batch to be trained by several shards, but "
                    f"'{name}' is a {type(module).__name__}; use LayerNorm or GroupNorm, or one "
                    "shard."
                )
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._averaging = Averaging(params, replica.count, replica.bucket_bytes, replica.start_sum)
        self.optimizer.register_step_pre_hook(lambda *_: self._averaging.finish())

    def run_interval(self, steps: int | None = None) -> Report:
        """Train for some steps and report; see `Trainer.run_interval`."""
        # stages change between intervals alone, so that the device is asked once
        layers = self.lattice.layers()
        rows = [(layer, layer.trainable.nonzero()[:, 0]) for layer in layers]
        # seeds that do not learn are not moved
        self._averaging.plan({id(p): learning for layer, learning in rows for p in layer.pool()})
        # in steps without seeds that learn alone nothing is asked
        alone = any(layer.any_training for layer in layers)
        with across.processes(self._replica.mean if alone else None):
            return super().run_interval(steps)

    def _step(self, step: int) -> Tensor:
        self._averaging.begin()
        return super()._step(step)

    def _next_batch(self) -> Split:
        x, y = super()._next_batch()
        rows = len(x) // self._replica.count
        part = slice(self._replica.rank * rows, (self._replica.rank + 1) * rows)
        return x[part], y[part]

    @torch.no_grad()
    def _report(self, loss: float) -> Report:
        device = self._train[0].device
        mean = self._replica.mean(torch.tensor(loss, dtype=torch.float64, device=device))
        for layer in self.lattice.layers():
            # all of it are sums and the counts to divide them by
            self._replica.mean(telemetry.gathered(layer.probe))
        with torch.enable_grad():
            return super()._report(float(mean))
