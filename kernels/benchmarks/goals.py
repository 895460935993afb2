"""What the kernels are to reach on an H200, and how each goal is read off the measured rows.

A time is that of the CUDA-graph replay over rotating inputs, of kernels and ceilings alike; the
time by events stands beside it in the tables.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Measured = tuple[str, str]

MAIN = {
    "T": 16384, "S": 1024, "C": 4, "H": 4, "phi": "relu", "active": "all", "dtype": "bf16",
    "observe": True, "isolated": 0, "provider": "triton",
}  # fmt: skip
SPAN = MAIN | {"C": 4096, "H": 1}


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        quantity: What is measured.
        probe: What an afternoon's probe reached, where there was one.
        goal: What is to be reached.
        measure: Maps all rows to the measured value and whether it reaches the goal; None if it
            was not measured.
    """

    quantity: str
    probe: str
    goal: str
    measure: Callable[[Sequence[Row]], Measured | None]


def find(rows: Sequence[Row], **wanted: object) -> Row | None:
    """The first row that was measured and has all these values."""
    fitting = (row for row in rows if all(row.get(k) == v for k, v in wanted.items()))
    return next((row for row in fitting if not {"failed", "skipped"} & row.keys()), None)


def time_us(row: Row) -> float:
    """Median time of a row of the seeds' benchmark."""
    times: dict[str, float] = row.get("graph_us") or row["cold_us"]
    return times["p50"]


def share(row: Row) -> float:
    """Share of the limit that binds."""
    return float(row["share_graph"] if "share_graph" in row else row["share_cold"])


def reached(met: bool) -> str:
    """A word for the table."""
    return "yes" if met else "**no**"


def _share(at_least: float, **case: object) -> Callable[[Sequence[Row]], Measured | None]:
    def measure(rows: Sequence[Row]) -> Measured | None:
        row = find(rows, **MAIN | case)
        if row is None:
            return None
        text = f"{share(row):.3f} ({time_us(row):.1f} us)"
        return text, reached(share(row) >= at_least)

    return measure


def _dormant(rows: Sequence[Row]) -> Measured | None:
    row = find(rows, **MAIN | {"mode": "dormant"})
    if row is None:
        return None
    speed = 1 / float(row["copies_graph"] if "copies_graph" in row else row["copies_cold"])
    return f"{speed:.2f} x ({time_us(row):.1f} us)", reached(speed >= 1.75)


def _flat(mode: str) -> Callable[[Sequence[Row]], Measured | None]:
    """Spread of the times over the numbers of seeds that memory binds."""

    def measure(rows: Sequence[Row]) -> Measured | None:
        times: dict[int, float] = {}
        for row in rows:
            common = ("phi", "active", "dtype", "observe", "isolated", "provider")
            same = row.get("mode") == mode and all(row.get(k) == MAIN[k] for k in common)
            bytes_ = row.get("T", 0) * row.get("D", 0) == 16384 * 4096 and row["C"] == row["H"]
            if same and bytes_ and row.get("bound") == "bytes":
                times[row["S"]] = time_us(row)
        if len(times) < 2:
            return None
        spread = max(times.values()) / min(times.values()) - 1
        counts = ", ".join(f"{s:,}: {t:.1f}" for s, t in sorted(times.items()))
        return f"{100 * spread:.0f} % apart (us: {counts})", reached(spread <= 0.15)

    return measure


def _span(mode: str) -> Callable[[Sequence[Row]], Measured | None]:
    def measure(rows: Sequence[Row]) -> Measured | None:
        found = []
        for active in ("64", "256", "512", "all"):
            ours = find(rows, **SPAN | {"mode": mode, "active": active})
            other = SPAN | {"mode": mode, "active": active, "provider": "torch.compile"}
            theirs = find(rows, **other)
            if ours and theirs:
                speed = time_us(theirs) / time_us(ours)
                found.append((active, speed, share(ours), time_us(ours)))
        if not found:
            return None
        text = "; ".join(f"{a} awake: {v:.2f} x, {s:.2f}, {t:.0f} us" for a, v, s, t in found)
        return text, reached(all(v >= 1.15 and s >= 0.85 for _, v, s, _ in found))

    return measure


def _six_layers(rows: Sequence[Row]) -> Measured | None:
    wanted = {"part": "layers", "what": "forward of the lattices"}
    ours = find(rows, **wanted, variant="esper, graph replay, with statistics")
    legacy = find(rows, **wanted, variant="legacy")
    if ours is None:
        return None
    text = f"{ours['ms']['p50']:.3f} ms"
    text += f" (legacy {legacy['ms']['p50']:,.0f} ms)" if legacy else ""
    return text, reached(ours["ms"]["p50"] <= 0.55)


def _gpt(rows: Sequence[Row]) -> Measured | None:
    dormant, active = (find(rows, part="gpt", arm=arm) for arm in ("dormant", "active"))
    if dormant is None or active is None:
        return None
    over = [100 * (row["over_bare"]["p50"] - 1) for row in (dormant, active)]
    text = f"{over[0]:+.1f} % / {over[1]:+.1f} %"
    return text, reached(over[0] <= 1 and over[1] <= 8)


def _call(rows: Sequence[Row]) -> Measured | None:
    compiled, graph = (
        find(rows, part="call", variant=variant, mode="eval") for variant in ("compile", "graph")
    )
    if compiled is None or graph is None:
        return None
    times = compiled["us"]["p50"], graph["us"]["p50"]
    text = f"{times[0]:.1f} / {times[1]:.1f} us"
    return text, reached(times[0] <= 15 and times[1] <= 6)


def _utilisation(rows: Sequence[Row]) -> Measured | None:
    row = find(rows, part="gpt", arm="active")
    if row is None:
        return None
    busy = row["sm_active_pct"]
    if not isinstance(busy, float | int):
        return str(busy), ""
    return f"{busy:.1f} % of SMs (NVML {row['nvml_pct']} %)", reached(busy >= 95)


GOALS = (
    Goal(
        "forward, 1,024 active seeds, H = C, ReLU, with statistics", "0.89 (77.5 us)",
        ">= 0.90 of copy speed", _share(0.90, mode="forward"),
    ),
    Goal(
        "same, SiLU", "0.87 (79.2 us)", ">= 0.90 of copy speed",
        _share(0.90, mode="forward", phi="silu"),
    ),
    Goal(
        "same, H = 4C, ReLU", "153 us", ">= 0.65 of copy speed", _share(0.65, mode="forward", H=16),
    ),
    Goal(
        "same, H = 4C, SiLU", "176 us", ">= 0.65 of copy speed",
        _share(0.65, mode="forward", H=16, phi="silu"),
    ),
    Goal(
        "backward, H = C, ReLU, with statistics", "285 us",
        ">= 0.70 of the limit (3 streams, 1.5 copies)", _share(0.70, mode="backward"),
    ),
    Goal(
        "read-only statistics of a dormant site", "1.6 x (42 us)",
        ">= 1.75 x faster than a copy", _dormant,
    ),
    Goal(
        "1 to 16,384 seeds at fixed D and H/C, forward (where bytes bind)", "",
        "within 15 % of flat", _flat("forward"),
    ),
    Goal("same, backward", "", "within 15 % of flat", _flat("backward")),
    Goal("6 x 1,024 seeds, forward of the lattices", "", "<= 0.55 ms graph-replayed", _six_layers),
    Goal(
        "span forward, 4,096 features, 64 to 1,024 of 1,024 units awake", "",
        ">= 1.15 x torch.compile, >= 0.85 of the limit", _span("span forward"),
    ),
    Goal("span backward", "", "same", _span("span backward")),
    Goal(
        "GPT-2 small, step time over the bare host, all dormant / all active", "",
        "<= 1 % / <= 8 %", _gpt,
    ),
    Goal(
        "T = 32, layer call from Python, torch.compile / graph replay", "",
        "<= 15 us / <= 6 us", _call,
    ),
    Goal(
        "GPU utilisation of the training loop, all seeds active", "45 % (seed system)",
        ">= 95 % SM active", _utilisation,
    ),
)  # fmt: skip
