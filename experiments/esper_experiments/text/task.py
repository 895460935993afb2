"""The task `char_text`: to tell the next character."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from esper.training.tasks import TASKS, Split, Task, TaskData
from esper_experiments.text.corpora import ALPHABET, read_python, read_shakespeare

TRAIN_FRAC = 0.9


@dataclass(frozen=True)
class TextData(TaskData):
    """Sequences of characters `[N, L]` and their successors `[N, L]`, both int64.

    A sample is a sequence, and its loss the mean over its characters, in nats. `inputs` is L,
    and `outputs` the size of the alphabet.
    """

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each sequence, `[N]`, from logits `[N, L, V]`."""
        each = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
        return each.view(targets.shape).mean(1)

    def metrics(self, name: str, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """`<name>_loss` in nats a character, and `<name>_bits` a character."""
        loss = float(self.losses(outputs, targets).double().mean())
        return {f"{name}_loss": loss, f"{name}_bits": loss / math.log(2)}


@TASKS.register("char_text")
class CharText(Task):
    """The next character of a corpus; all pairs see the same text.

    The first 90 % are for training, the first half of the rest for decisions while training, the
    second half for the final metrics.
    """

    corpus: Literal["shakespeare", "python"] = Field(description="Text of an installed package.")
    path: Path | None = Field(
        None, description="Of the Shakespeare file; None: downloaded once to the cache folder."
    )
    length: PositiveInt = Field(128, description="Characters of a sequence.")
    characters: PositiveInt | None = Field(
        None, description="How much of the corpus is used, from its beginning; None: all."
    )
    held_out_sequences: PositiveInt | None = Field(
        None, description="How many are kept for decisions, from the first on; None: all."
    )

    def load(self, seed: int) -> TaskData:
        """Sequences without overlap, in the text's order.

        Raises:
            ValueError: If the corpus cannot be read, or is too short for a sequence a split.
        """
        text = read_python() if self.corpus == "python" else read_shakespeare(self.path)
        codes = {character: i for i, character in enumerate(ALPHABET)}
        tokens = torch.tensor([codes[c] for c in text if c in codes][: self.characters])
        cut = int(TRAIN_FRAC * len(tokens))
        middle = cut + (len(tokens) - cut) // 2
        train = self._split(tokens[:cut])
        held_out = self._split(tokens[cut:middle], self.held_out_sequences)
        test = self._split(tokens[middle:])
        return TextData(train, held_out, test, "classification", self.length, len(ALPHABET))

    def _split(self, tokens: Tensor, most: int | None = None) -> Split:
        count = (len(tokens) - 1) // self.length
        if count < (most or 1):
            raise ValueError(
                f"length must leave at least {most or 1} sequences a split, but {self.length} "
                f"leaves {count} of {len(tokens)} characters; lower length or held_out_sequences."
            )
        count = most or count
        x = tokens[: count * self.length].view(count, self.length)
        y = tokens[1 : count * self.length + 1].view(count, self.length)
        return x.clone(), y.clone()
