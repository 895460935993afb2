"""Character-level text: the task `char_text` and the host `char_gpt`.

A run names this package under `plugins`. Two standing experiments use it: a GPT whose MLPs are
widened while it trains (`configs/sweeps/ab_gpt_growth.yaml`), and a frozen GPT that seeds adapt to
other text, against LoRA and AdaLoRA (`configs/sweeps/ab_adapt_*.yaml`).
"""

from esper_experiments.text.adapters import Adapter
from esper_experiments.text.gpt import CharGpt
from esper_experiments.text.task import CharText, TextData

__all__ = ["Adapter", "CharGpt", "CharText", "TextData"]
