"""Gradients of replicas are averaged while the backward pass still computes others.

They travel in buckets, the last layers' first, since their gradients are there first. Buckets leave
in a fixed order, each when all its gradients are there, so that all replicas send the same messages
whatever their autograd engines do. A model that fits one bucket sends one message, after its last
gradient. What is in a bucket follows from the model's state alone, never from how it got there: a
resumed run sums in the same order as an undisturbed one.

Source: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB
2020. Its `DistributedDataParallel` wraps the model and reduces whole tensors; here rows of a pool
travel only if their seeds learn.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class Sum(Protocol):
    """A sum over all replicas that is on its way."""

    def wait(self) -> None:
        """Return when what was given holds the sum."""
        ...


@dataclass(frozen=True)
class _Sent:
    """A message on its way: the sum of some gradients, one after the other.

    Attributes:
        params: Whose they are.
        grads: As they were when they were sent, and how often they had been changed.
        shapes: Of what was sent of each.
        flat: Becomes the sum.
        work: Its way.
    """

    params: list[Tensor]
    grads: list[tuple[Tensor, int]]
    shapes: list[torch.Size]
    flat: Tensor
    work: Sum


class Averaging:
    """Averages the gradients of some parameters over all replicas.

    Args:
        params: In the order of the forward pass, as far as it is known.
        count: Number of replicas.
        bucket_bytes: Gradients in one message, unless one alone is larger.
        start: Begins to sum a tensor over all replicas, in place.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        count: int,
        bucket_bytes: int,
        start: Callable[[Tensor], Sum],
    ) -> None:
        self._params = [p for p in reversed(params) if p.requires_grad]
        self._count, self._bucket_bytes, self._start = count, bucket_bytes, start
        self._buckets: list[list[Tensor]] = []
        self._bucket_of: dict[int, int] = {}
        self._rows: Mapping[int, Tensor] = {}
        self._silent: set[int] = set()
        self._missing: list[set[int]] = []
        self._sent: list[_Sent] = []
        self._next = 0
        self._open = False
        for param in self._params:
            param.register_post_accumulate_grad_hook(self._arrived)

    def plan(self, rows: Mapping[int, Tensor]) -> None:
        """Fill the buckets for the steps to come.

        Args:
            rows: By the `id` of a parameter: the rows of its gradient that travel. All of a
                parameter that is not named; nothing of one that has none.
        """
        self._rows, self._silent = rows, set()
        self._buckets, self._bucket_of = [], {}
        room: dict[torch.dtype, int] = {}
        last: dict[torch.dtype, int] = {}
        for param in self._params:
            size = self._size(param)
            if not size:
                continue
            if param.dtype not in last or size > room[param.dtype]:
                last[param.dtype] = len(self._buckets)
                room[param.dtype] = self._bucket_bytes
                self._buckets.append([])
            room[param.dtype] -= size
            self._buckets[last[param.dtype]].append(param)
            self._bucket_of[id(param)] = last[param.dtype]

    def begin(self) -> None:
        """A backward pass follows."""
        self._missing = [{id(p) for p in bucket} - self._silent for bucket in self._buckets]
        self._sent, self._next, self._open = [], 0, True

    @torch.no_grad()
    def finish(self) -> None:
        """Put the means in place of the gradients; the backward pass is over."""
        self._open = False
        arrived = {id(p) for p in self._params if p.grad is not None}
        while self._next < len(self._buckets):
            self._send(self._buckets[self._next])
            self._next += 1
        # one that nobody waited for, or that an optimizer's hook added to after it was sent
        known = {
            id(p): grad
            for sent in self._sent
            for p, grad in zip(sent.params, sent.grads, strict=True)
        }
        stale = [p for b in self._buckets for p in b if _differs(p.grad, known.get(id(p)))]
        for dtype in dict.fromkeys(p.dtype for p in stale):
            self._send([p for p in stale if p.dtype == dtype])
        for sent in self._sent:
            self._receive(sent)
        self._sent = []
        # in the next step nobody waits for them
        self._silent = set(self._bucket_of) - arrived

    def _size(self, param: Tensor) -> int:
        """Bytes of its gradient that travel."""
        rows = self._rows.get(id(param))
        number = param.numel() if rows is None else len(rows) * param[0].numel()
        return number * param.element_size()

    @torch.no_grad()
    def _arrived(self, param: Tensor) -> None:
        if not self._open or id(param) not in self._bucket_of:
            return
        self._missing[self._bucket_of[id(param)]].discard(id(param))
        while self._next < len(self._buckets) and not self._missing[self._next]:
            self._send(self._buckets[self._next])
            self._next += 1

    def _send(self, params: Sequence[Tensor]) -> None:
        given = [p for p in params if p.grad is not None]
        if not given:
            return
        grads = [p.grad for p in given if p.grad is not None]
        parts = [self._part(p, g) for p, g in zip(given, grads, strict=True)]
        flat = torch.cat([part.reshape(-1) for part in parts])
        self._sent.append(
            _Sent(
                given,
                [(g, g._version) for g in grads],
                [part.shape for part in parts],
                flat,
                self._start(flat),
            )
        )

    def _part(self, param: Tensor, grad: Tensor) -> Tensor:
        rows = self._rows.get(id(param))
        return grad if rows is None else grad[rows]

    def _receive(self, sent: _Sent) -> None:
        sent.work.wait()
        means = sent.flat.div_(self._count).split([shape.numel() for shape in sent.shapes])
        for param, shape, mean in zip(sent.params, sent.shapes, means, strict=True):
            rows = self._rows.get(id(param))
            if rows is None:
                # not copied: the optimizer reads it where it came in
                param.grad = mean.view(shape)
            else:
                assert param.grad is not None
                param.grad[rows] = mean.view(shape)


def _differs(grad: Tensor | None, sent: tuple[Tensor, int] | None) -> bool:
    """Whether a gradient is there that was not sent as it is."""
    if grad is None:
        return False
    return sent is None or grad is not sent[0] or grad._version != sent[1]
