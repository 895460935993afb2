"""What torch.compile does when seeds change their stage: nothing, since only data changes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esper.config.run import GrowthConfig
from esper.regress.finding import Finding, capped
from esper.seeds.actions import Action, Advance, Cull, Germinate, Promote, Rollback
from esper.seeds.state import Stage
from esper.surgery.attach import attach
from esper.surgery.lattice import Lattice

SITES = ("conv", "fc1", "fc1->fc2")
# one seed goes all the way, the others end early and their slots are used again
STORY: tuple[tuple[Action, ...], ...] = (
    (),
    (Germinate("", 0, "mlp_gelu"), Germinate("", 1, "low_rank"), Germinate("", 2, "mlp_relu")),
    (Promote("", 0), Promote("", 1), Promote("", 2)),
    (Advance("", 0), Cull("", 1), Advance("", 2)),
    (Advance("", 0), Advance("", 1), Rollback("", 2)),
    (Advance("", 0), Germinate("", 1, "mlp_silu", "cosine")),
    (Advance("", 0), Promote("", 1), Advance("", 2)),
    (Advance("", 0), Advance("", 1)),
    (Advance("", 1),),
)
# stages in which a seed takes part in a pass in a way of its own
NEEDED = {
    Stage.DORMANT, Stage.TRAINING, Stage.GRAFTING, Stage.STABILIZATION, Stage.EVALUATING,
    Stage.FINE_TUNING, Stage.FOSSILIZED, Stage.CULLED, Stage.ROLLED_BACK,
}  # fmt: skip
STEPS = 3
# of the loss, compiled against eager
MOST_FRAC = 1e-4


class Host(nn.Module):
    """A convolution and two linear layers: places for chunk seeds and for a span."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.fc1, self.act, self.fc2 = nn.Linear(24, 12), nn.GELU(), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        """`[T, 6]` to `[T, 8]`."""
        h = self.conv(x.unsqueeze(1)).flatten(1)
        y: Tensor = self.fc2(self.act(self.fc1(h)))
        return y


class _Side:
    """One of two models that live the same life, the eager one or the compiled one."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        self.model = Host().to(device)
        growth = GrowthConfig(ramp_steps=4)
        for site in SITES[:2]:
            attach(self.model, site, 4, growth=growth, hidden=4)
        self.lattice: Lattice = attach(self.model, SITES[2], 4, geometry="span", growth=growth)
        self.x, self.target = (torch.randn(16, n).to(device) for n in (6, 8))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.run: Any = self.model

    def tell(self, actions: Sequence[Action]) -> None:
        self.lattice.apply(
            [type(a)(**{**vars(a), "site": site}) for site in SITES for a in actions]
        )

    def loss(self) -> Tensor:
        loss: Tensor = (self.run(self.x) - self.target).square().mean()
        return loss

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def recompilations(device: str = "cpu") -> Finding:
    """How often a stage change makes torch.compile compile again, in training and in evaluation.

    Every interval, stages change at three sites, and a compiled model takes the steps that an
    eager one takes beside it: their losses agree, or the compiled one ignored the change.

    Args:
        device: Where both run. What is counted is what Dynamo hands to its backend, whichever
            that is, so that the backend here generates no code.
    """
    from torch._dynamo.backends.registry import lookup_backend

    problems, seen, compiled, changes = list[str](), set[int](), list[str](), 0
    behind, mode = lookup_backend("aot_eager"), "training"

    def counting(graph: Any, inputs: Any) -> Any:
        compiled.append(mode)
        return behind(graph, inputs)

    torch._dynamo.reset()
    try:
        eager, ours = _Side(device), _Side(device)
        ours.run = torch.compile(ours.model, backend=counting, fullgraph=True)
        for number, actions in enumerate(STORY):
            changes += bool(actions)
            for side in (eager, ours):
                side.tell(actions)
            seen |= set(ours.lattice.layer("fc1").state[:, 0].tolist())
            mode = "evaluation"
            for side in (eager, ours):
                side.model.eval()
            with torch.no_grad():
                pairs = [(float(ours.loss()), float(eager.loss()))]
            mode = "training"
            for side in (eager, ours):
                side.model.train()
            pairs += [(ours.step(), eager.step()) for _ in range(STEPS)]
            for side in (eager, ours):
                side.lattice.report(1.0)
            apart = max(abs(a - b) / abs(b) for a, b in pairs)
            if not apart <= MOST_FRAC:
                problems.append(f"interval {number}: the compiled loss is off by {apart:.2g}")
    finally:
        torch._dynamo.reset()
    if unseen := NEEDED - {Stage(code) for code in seen}:
        problems.append(f"no seed was ever {', '.join(s.name for s in sorted(unseen))}")
    first = {"training", "evaluation"}
    if set(compiled) != first:
        problems.append(f"compiled for {sorted(set(compiled))}, not for {sorted(first)}")
    again = len(compiled) - len(set(compiled))
    if again:
        problems.append(f"compiled {again} times again over {changes} changes of stages")
    return Finding(
        capped(problems), changes, {"recompilations_per_stage_change": (again / changes, "count")},
        (f"{len(compiled)} graphs on {device}: {', '.join(compiled)}",),
    )  # fmt: skip
