"""The lattice's own optimizer: AdamW, Adam or SGD for the seeds that train, and no others.

An optimizer of torch moves whole pools, and the guard then puts frozen rows back. Here a step
begins at each seed's flags: the rows of frozen and dormant seeds are never read, a fresh seed's
moments begin again, every seed has the bias correction of its own age and its own factor on the
learning rate, and the grafts move on. On a GPU that is one launch a site. Everything is decided by
data on the device, so that a whole lifecycle passes through one captured CUDA graph.

The host keeps an optimizer of its own:

    host = torch.optim.AdamW(lattice.host_parameters(), lr=1e-3)
    seeds = esper.SeedOptimizer(lattice, lr=1e-3)
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from esper.seeds import optimizer_guard
from esper.seeds.kasmina import KasminaLayer
from esper.seeds.local_rows import local_rows
from esper_kernels.ops.pool_step import pool_step
from esper_kernels.reference.pool_step import PoolTensor, Rule, SeedFlags

Kind = Literal["adamw", "sgd"]


class HasPools(Protocol):
    """A `Lattice`, or one of its layers."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The pools."""


class SeedOptimizer(Optimizer):
    """Moves the seeds that train; give it the lattice once, for the whole run.

    Args:
        lattice: A lattice, or its parameters (or groups of them) as for any optimizer. All three
            tensors of a site's pool belong into one group.
        lr: Learning rate. A step that is captured in a CUDA graph keeps the number it was
            captured with; a tensor on the pool's device is read anew by every replay.
        betas: Of AdamW.
        eps: Of AdamW.
        weight_decay: Of the rows that train.
        kind: 'adamw' or 'sgd'.
        momentum: Of SGD.
        decoupled: Whether the decay acts on the weights themselves (AdamW), or joins the gradient
            (Adam; SGD as in torch); None: for AdamW only.

    Raises:
        ValueError: If a number is out of range, or the parameters are not whole pools.
    """

    # the guard leaves this optimizer's pools alone
    steps_seeds_alone = True

    def __init__(
        self,
        lattice: HasPools | ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        kind: Kind = "adamw",
        momentum: float = 0.0,
        *,
        decoupled: bool | None = None,
    ) -> None:
        decoupled = kind == "adamw" if decoupled is None else decoupled
        # only what the kind has, since schedules look for these names
        own = {"betas": betas, "eps": eps} if kind == "adamw" else {"momentum": momentum}
        defaults = {"lr": lr, "weight_decay": weight_decay, "kind": kind, "decoupled": decoupled}
        # a counter for each site, by its `w_in`, that is 0 between steps
        self._arrivals: dict[int, Tensor] = {}
        params: Any = lattice.parameters() if hasattr(lattice, "parameters") else lattice
        super().__init__(params, {**defaults, **own})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the pools of some sites; see `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: As the class does.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_numbers(group)
            layers = _whole_pools(group)
        except ValueError:
            self.param_groups.pop()
            raise
        for layer in layers:
            self._make_state(layer, group)

    def lr_scale(self, layer: KasminaLayer) -> Tensor:
        """Factor of each seed on the learning rate, `[S]` fp32, 1 at first; change it in place."""
        scale: Tensor = self.state[layer.w_in]["lr_scale"]
        return scale

    def steps(self, layer: KasminaLayer) -> Tensor:
        """Steps so far, `[1]` int32 on the layer's device; replays of a CUDA graph included."""
        count: Tensor = self.state[layer.w_in]["steps"]
        return count

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every pool.

        Args:
            closure: Computes the loss and the gradients, if given.

        Returns:
            What the closure returns, else None.

        Raises:
            ValueError: If parameters with a gradient belong to no layer any more, another
                optimizer moves them too, or a schedule could not act in the CUDA graph that is
                being captured.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pools = optimizer_guard.pools()
        for group in self.param_groups:
            for param in group["params"]:
                if id(param) in pools:
                    layer, index = pools[id(param)]
                    if index == 0:
                        self._step_layer(layer, group)
                # a folded lattice leaves parameters that nothing computes with
                elif param.grad is not None:
                    raise ValueError(
                        "parameters must be pools of a lattice, but some have a gradient and "
                        "belong to none; build the SeedOptimizer after what replaces parameters, "
                        "such as fully_shard."
                    )
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer; rates that are tensors come as plain numbers."""
        content = super().state_dict()
        content["param_groups"] = [
            {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items()}
            for group in content["param_groups"]
        ]
        return content

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer, but into the tensors that are there: captured graphs stay valid.

        Raises:
            ValueError: If the state is that of other pools or of another kind; nothing is changed.
        """
        before = self.state, self.param_groups
        super().load_state_dict(state_dict)
        loaded, loaded_groups = self.state, self.param_groups
        self.state, self.param_groups = before
        for param, own in self.state.items():
            shapes = {key: tensor.shape for key, tensor in own.items()}
            theirs = {key: tensor.shape for key, tensor in loaded[param].items()}
            if shapes != theirs:
                raise ValueError(
                    f"state must be that of the same pools and kind, {shapes}, but got {theirs}; "
                    "build the optimizer as it was when its state was saved."
                )
        for param, own in self.state.items():
            for key, tensor in own.items():
                tensor.copy_(loaded[param][key])
        for group, new in zip(self.param_groups, loaded_groups, strict=True):
            for key, value in new.items():
                if isinstance(group.get(key), Tensor) and not isinstance(value, Tensor):
                    group[key].fill_(value)
                else:
                    group[key] = value

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_arrivals": {}}

    def _step_layer(self, layer: KasminaLayer, group: dict[str, Any]) -> None:
        capturing = optimizer_guard.is_capturing(layer)
        optimizer_guard.require_one_mover(layer, self)
        if layer.young_rate != 1:
            raise ValueError(
                f"growth.young_rate must be 1 with a SeedOptimizer, but got {layer.young_rate}; "
                "use lr_scale, or an optimizer of torch."
            )
        if capturing:
            _require_rate_on_device(group)
        self._make_state(layer, group)
        pool, first_row = [], 0
        for param in layer.pool():
            weights, rows = local_rows(param)
            grad = None if param.grad is None else local_rows(param.grad)[0]
            own, first_row = self.state[param], rows.start
            moments = [local_rows(own[key])[0] for key in _moments_of(group)]
            first, second = (*moments, None, None)[:2]
            pool.append(PoolTensor(weights, grad, first, second, own.get("age")))
        own = self.state[layer.w_in]
        flags = SeedFlags(
            layer.trainable, layer.fresh, own["lr_scale"], own["steps"],
            self._arrivals[id(layer.w_in)],
        )  # fmt: skip
        ramp = optimizer_guard.ramp_of(layer)
        pool_step((pool[0], pool[1], pool[2]), flags, ramp, _rule(group), first_row)
        if not capturing:
            layer.any_fresh = False
        optimizer_guard.count_step(layer)

    def _make_state(self, layer: KasminaLayer, group: dict[str, Any]) -> None:
        """Zeros for what is missing, and everything to where the pool is now.

        Made with the optimizer, since zeros that are made while a CUDA graph is captured would be
        made again by every replay.
        """
        device, S = layer.state.device, layer.num_seeds
        for param in layer.pool():
            own = self.state[param]
            for key in _moments_of(group):
                if key not in own:
                    own[key] = torch.zeros_like(param, requires_grad=False)
            if group["kind"] == "adamw" and "age" not in own:
                own["age"] = torch.zeros(S, device=device)
        own, site = self.state[layer.w_in], id(layer.w_in)
        if "lr_scale" not in own:
            own["lr_scale"] = torch.ones(S, device=device)
            own["steps"] = torch.zeros(1, dtype=torch.int32, device=device)
        if own["steps"].device != device:
            for param in layer.pool():
                self.state[param] = {k: v.to(device) for k, v in self.state[param].items()}
        if site not in self._arrivals or self._arrivals[site].device != device:
            self._arrivals[site] = torch.zeros(S, dtype=torch.int32, device=device)


def _moments_of(group: dict[str, Any]) -> tuple[str, ...]:
    if group["kind"] == "adamw":
        return "exp_avg", "exp_avg_sq"
    return ("momentum_buffer",) if group["momentum"] else ()


def _rule(group: dict[str, Any]) -> Rule:
    own = {key: group[key] for key in ("betas", "eps", "momentum") if key in group}
    adam = group["kind"] == "adamw"
    return Rule(adam, group["lr"], group["weight_decay"], group["decoupled"], **own)


def _check_numbers(group: dict[str, Any]) -> None:
    if group["kind"] not in get_args(Kind):
        raise ValueError(f"kind must be one of {get_args(Kind)}, but got '{group['kind']}'.")
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(
            f"lr must be one number, but got shape {tuple(group['lr'].shape)}; "
            "use lr_scale for a factor of each seed."
        )
    for name in ("lr", "eps", "weight_decay", "momentum"):
        value = group.get(name, 0.0)
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{name} must be at least 0, but got {value}.")
    if not all(0 <= beta < 1 for beta in group.get("betas", ())):
        raise ValueError(f"betas must be at least 0 and less than 1, but got {group['betas']}.")


def _whole_pools(group: dict[str, Any]) -> list[KasminaLayer]:
    """The layers whose pools the group holds."""
    pools, given = optimizer_guard.pools(), {id(p) for p in group["params"]}
    foreign = len(given - pools.keys())
    if foreign:
        raise ValueError(
            f"parameters must be pools of a lattice, but {foreign} of {len(given)} are not; "
            "give lattice.host_parameters() to an optimizer of torch."
        )
    layers = [pools[i][0] for i in given if pools[i][1] == 0]
    whole = {id(p) for layer in layers for p in layer.pool()}
    if whole != given:
        raise ValueError(
            "parameters must be whole pools, w_in, bias and w_out in one group, but some are "
            "missing; give lattice.parameters(), or layer.pool() for each group."
        )
    for layer in layers:
        for param in layer.pool():
            local_rows(param)
    return layers


def _require_rate_on_device(group: dict[str, Any]) -> None:
    lr = group["lr"]
    read_anew = isinstance(lr, Tensor) and lr.is_cuda
    if not read_anew and (isinstance(lr, Tensor) or "initial_lr" in group):
        raise ValueError(
            f"lr must be a tensor on the GPU for a schedule to act in a captured CUDA graph, but "
            f"got {lr!r}; build the optimizer with lr=torch.tensor({float(lr)}, device='cuda')."
        )
