"""What `bench_shards.py` trains: a GPT-2-small-sized host on random tokens, as a run's plug-ins."""

import torch
from gpt import GPT, Size
from pydantic import PositiveInt
from torch import Tensor

from esper.training.tasks import TASKS, Split, Task
from esper_experiments.text.task import TextData


@TASKS.register("random_tokens")
class RandomTokens(Task):
    """Sequences that nothing can be learned from; what a step costs does not depend on them."""

    vocabulary: PositiveInt
    positions: PositiveInt
    sequences: PositiveInt
    held_out: PositiveInt = 2

    def load(self, seed: int) -> TextData:
        """Tokens `[N, T]` and their successors."""
        splits = [self._draw(seed, i, n) for i, n in enumerate((self.sequences, self.held_out))]
        train, held_out = splits
        return TextData(
            train, held_out, held_out, "classification", self.positions, self.vocabulary
        )

    def _draw(self, seed: int, split: int, count: int) -> Split:
        shape = count, self.positions + 1
        tokens = torch.from_numpy(self.rng(seed, split).integers(0, self.vocabulary, shape))
        return tokens[:, :-1].clone(), tokens[:, 1:].clone()


class Host(GPT):
    """The GPT as a host: maps tokens `[B, T]` to logits `[B, T, V]`; bf16 on a GPU."""

    def forward(self, tokens_BT: Tensor) -> Tensor:  # type: ignore[override]
        """The logits."""
        with torch.autocast(tokens_BT.device.type, torch.bfloat16, enabled=tokens_BT.is_cuda):
            return self.logits(tokens_BT)


def build(**size: int) -> Host:
    """A host of some size; see `Size`."""
    return Host(Size(**size))
