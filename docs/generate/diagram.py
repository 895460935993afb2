"""The lifecycle of a seed as a picture, drawn from the table of legal moves."""

from esper.seeds.actions import Advance, Cancel, Cull, Germinate, Promote, Rollback
from esper.seeds.lifecycle import MOVES
from esper.seeds.state import Stage

# column and row of each stage: life goes to the right, what fails goes below
PLACES: dict[Stage, tuple[float, float]] = {
    Stage.DORMANT: (0, 0), Stage.GERMINATED: (1, 0), Stage.TRAINING: (2, 0),
    Stage.GRAFTING: (3, 0), Stage.STABILIZATION: (4, 0), Stage.EVALUATING: (5, 0),
    Stage.FINE_TUNING: (6, 0), Stage.FOSSILIZED: (7, 0),
    Stage.CANCELLED: (1, 1), Stage.CULLED: (3.65, 2), Stage.ROLLED_BACK: (5, 3),
}  # fmt: skip
COLOURS = {
    Germinate: "#2f7d32", Promote: "#2f7d32", Advance: "#2f7d32",
    Cancel: "#8a6d00", Cull: "#b3261e", Rollback: "#5b3fa0",
}  # fmt: skip
COLUMN, ROW, WIDTH, HEIGHT, MARGIN = 140, 92, 112, 38, 16


def lifecycle() -> str:
    """An SVG that says every stage and every legal move."""
    if missing := set(Stage) - set(PLACES):
        raise ValueError(f"PLACES must name every stage, but lacks {missing}; add its place.")
    width = 7 * COLUMN + WIDTH + 2 * MARGIN
    height = 3 * ROW + HEIGHT + 2 * MARGIN + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'role="img" font-family="sans-serif" font-size="13">',
        "<title>Stages of a seed and the legal moves between them</title>",
        f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>',
        *(_marker(kind.__name__, colour) for kind, colour in COLOURS.items()),
        *(_move(before, kind, after) for (before, kind), after in MOVES.items()),
        *(_stage(stage) for stage in Stage),
        *_legend(height - 18),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _corner(stage: Stage) -> tuple[float, float]:
    column, row = PLACES[stage]
    return MARGIN + column * COLUMN, MARGIN + row * ROW


def _stage(stage: Stage) -> str:
    x, y = _corner(stage)
    ends = stage is Stage.FOSSILIZED
    return (
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#f4f5fb" '
        f'stroke="#30364d" stroke-width="{3 if ends else 1.2}"/>'
        f'<text x="{x + WIDTH / 2}" y="{y + 24}" text-anchor="middle" font-size="12" '
        f'fill="#1c2030">{stage.value} {stage.name}</text>'
    )


def _move(before: Stage, kind: type, after: Stage) -> str:
    (x, y), (u, v) = _corner(before), _corner(after)
    if v == y:  # to the right
        path = f"M{x + WIDTH} {y + HEIGHT / 2} H{u - 2}"
    elif v > y:  # down to what failed; moves of one kind enter side by side
        sources = [b for (b, k), a in MOVES.items() if a is after]
        share = (sources.index(before) + 1) / (len(sources) + 1)
        start = x + WIDTH * (0.3 if kind is Cull else 0.7 if kind is Rollback else 0.5)
        lane = v - 14 - 5 * sources.index(before)
        path = f"M{start:.0f} {y + HEIGHT} V{lane} H{u + WIDTH * share:.0f} V{v - 2}"
    else:  # back to a dormant slot
        end = u + WIDTH * (0.2 + 0.25 * (PLACES[before][1] - 1))
        path = f"M{x} {y + HEIGHT / 2} H{end:.0f} V{v + HEIGHT + 2}"
    name = kind.__name__
    return (
        f'<path d="{path}" fill="none" stroke="{COLOURS[kind]}" stroke-width="1.5" '
        f'marker-end="url(#{name})"><title>{before.name} - {name} - {after.name}</title></path>'
    )


def _marker(name: str, colour: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{colour}"/></marker>'
    )


def _legend(y: int) -> list[str]:
    names = {"Germinate, Promote, Advance": Advance, "Cancel": Cancel, "Cull": Cull,
             "Rollback": Rollback}  # fmt: skip
    parts, x = [], MARGIN
    for text, kind in names.items():
        parts.append(f'<path d="M{x} {y} h24" stroke="{COLOURS[kind]}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 32}" y="{y + 4}" fill="#1c2030">{text}</text>')
        x += 60 + 8 * len(text)
    return parts
