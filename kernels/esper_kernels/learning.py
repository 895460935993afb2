"""What a seed learns: nothing, the task, or, alone, an objective of its own.

The operators take both as numbers: what each seed learns as one of `FROZEN`, `TASK` and `ISOLATED`,
and the objective of those that learn alone by its place in `OBJECTIVES`.
"""

from typing import Literal

# what the gradient of a seed's weights is: none, that of the loss, that of its own objective
FROZEN, TASK, ISOLATED = range(3)

Objective = Literal["desired_update", "reconstruction"]
OBJECTIVES: tuple[Objective, ...] = ("desired_update", "reconstruction")
RECONSTRUCTION = OBJECTIVES.index("reconstruction")

# size of a desired update over that of the activations which it is to change
TARGET_FRAC = 0.1
