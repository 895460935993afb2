"""What can go wrong with shards that live elsewhere; every error survives pickling."""

from collections.abc import Sequence


class ShardLostError(RuntimeError):
    """Shards died, hung or lost touch with the others; the trial may go on from a checkpoint."""

    def __init__(self, ranks: Sequence[int], what: str) -> None:
        # all arguments go to the base class so that the error survives pickling between actors
        super().__init__(tuple(ranks), what)
        self.ranks, self.what = tuple(ranks), what

    def __str__(self) -> str:
        return f"{_named(self.ranks)} {self.what}"


class ReplicasDifferError(RuntimeError):
    """Replicas of one model are not equal any more; nothing that they compute can be trusted."""

    def __init__(self, interval: int, ranks: Sequence[int], tensors: Sequence[str]) -> None:
        # all arguments go to the base class so that the error survives pickling between actors
        super().__init__(interval, tuple(ranks), tuple(tensors))
        self.interval, self.ranks, self.tensors = interval, tuple(ranks), tuple(tensors)

    def __str__(self) -> str:
        shown = ", ".join(self.tensors[:3]) + (", ..." if len(self.tensors) > 3 else "")
        return (
            f"all replicas must be equal after interval {self.interval}, but {_named(self.ranks)} "
            f"differ from shard 0 in {len(self.tensors)} tensors: {shown}; go on from the last "
            "checkpoint, with hardware that computes the same everywhere."
        )


class NoRoomError(ShardLostError):
    """The cluster has no room for the shards."""


class ShardMemoryError(ShardLostError):
    """Shards ran out of memory."""

    def __str__(self) -> str:
        return (
            f"{_named(self.ranks)} ran out of memory: {self.what}; lower train.batch_size, or give "
            "each shard less to do (more shards) or more room (a larger device, no other trial "
            "on it)."
        )


class RepeatedFailureError(RuntimeError):
    """The run failed twice in the same interval; to try again would go on for ever."""

    def __init__(self, interval: int, what: str) -> None:
        # all arguments go to the base class so that the error survives pickling between actors
        super().__init__(interval, what)
        self.interval, self.what = interval, what

    def __str__(self) -> str:
        return (
            f"interval {self.interval} must succeed when it is repeated from a checkpoint, but "
            f"failed twice: {self.what}; the last checkpoint is kept: mend the cause, then go on "
            "from it with --resume."
        )


def _named(ranks: Sequence[int]) -> str:
    return f"shard{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
