r"""Draw what adapting costs: the result of each method against its trainable parameters.

python experiments/benchmarks/adaptation_front.py docs/images/adaptation_front.png \
    docs/results/ab_adapt_*.json

Arms are named `method-parameters`; others are left out. AdaLoRA is drawn at the size that it ends
with, though it begins with half as many more. Bars are 95 % intervals of the mean over the pairs'
seeds, by Student's t.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from esper.tracking.style import DPI, STYLE, WIDTH_IN

METHODS = {
    "esper": "#D55E00", "lora": "#0072B2", "lora+head": "#56B4E9", "adalora": "#009E73",
}  # fmt: skip
LABELS = {"test_accuracy": "test accuracy, %", "test_loss": "test loss, nats a character"}


def draw(axes: Axes, file: Path) -> None:
    """One shift."""
    result = json.loads(file.read_text(encoding="utf-8"))
    scale = 100 if "accuracy" in result["metric"] else 1
    width = scale * stats.t.ppf(0.975, result["pairs"] - 1) / result["pairs"] ** 0.5
    fronts = defaultdict(list)
    for name, arm in result["arms"].items():
        method, _, parameters = name.rpartition("-")
        if parameters.isdecimal():
            point = int(parameters), scale * arm["mean"], width * arm["sd"]
            fronts[method].append(point)
    for method, points in fronts.items():
        x, y, bar = zip(*sorted(points), strict=True)
        axes.errorbar(x, y, bar, label=method, color=METHODS[method], marker="o", capsize=3)
    axes.set_title(f"{file.stem.removeprefix('ab_adapt_')}, {result['pairs']} pairs")
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel(LABELS[result["metric"]])
    axes.set_xlim(left=0)


def main(picture: Path, files: list[Path]) -> None:
    """All shifts beside one another."""
    with rc_context(STYLE):
        figure = Figure((WIDTH_IN, 3.4 * ((len(files) + 1) // 2)), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        for at, file in enumerate(files):
            draw(figure.add_subplot((len(files) + 1) // 2, 2, at + 1), file)
        max(figure.axes, key=lambda axes: len(axes.containers)).legend()
        figure.savefig(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
