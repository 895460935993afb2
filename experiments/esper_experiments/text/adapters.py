"""LoRA and AdaLoRA by the package `peft`, as rivals of seeds on a frozen host.

The trainer knows nothing of adapters. AdaLoRA, which does more than a gradient step, is hooked to
the optimizer: before each step the gradient of its orthogonality penalty is added, and after it
the ranks are allotted anew. How far it has come is not part of a checkpoint, so that a run with
AdaLoRA cannot be continued from one.

Source: Hu et al., "LoRA", ICLR 2022; Zhang et al., "AdaLoRA", ICLR 2023.
"""

import math
import warnings
import weakref
from importlib import import_module
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from esper.config.base import Config

# AdaLoRA's ranks at the start over those at the end, and its first and last share of the steps
# with fixed ranks; the paper's ratio, and shares within the range of its experiments
START_RATIO, FIRST_FRAC, LAST_FRAC = 1.5, 0.1, 0.3
ORTHOGONALITY = 0.1


class Adapter(Config):
    """What is added to the frozen maps."""

    kind: Literal["lora", "adalora"] = Field(description="Which of peft's methods.")
    rank: PositiveInt = Field(description="Of each map; AdaLoRA: the mean at the end.")
    scale: PositiveFloat = Field(1.0, description="Factor of what it adds.")
    targets: tuple[str, ...] = Field(
        ("qkv", "out", "fc1", "fc2"), min_length=1, description="Last names of the maps."
    )
    bias: bool = Field(False, description="LoRA: whether it adds a bias to each map as well.")
    total_steps: PositiveInt | None = Field(
        None, description="AdaLoRA: steps of the whole run, which its schedule needs."
    )

    @model_validator(mode="after")
    def _steps_known(self) -> "Adapter":
        if (self.kind == "adalora") != (self.total_steps is not None):
            raise ValueError(
                "total_steps must be given for kind 'adalora' and for no other, but got "
                f"{self.total_steps} for '{self.kind}'; set it to train.steps."
            )
        if self.bias and self.kind != "lora":
            raise ValueError(f"bias must be false for kind '{self.kind}', but is true.")
        return self


def add_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Put an adapter into a frozen model, in place; only its own weights train.

    Raises:
        ValueError: If `peft` is not installed, or a target is no map of the model.
    """
    try:
        # whether it is installed or not, no type is known of it
        peft: Any = import_module("peft")
    except ImportError as error:
        raise ValueError(
            f"host.options.adapter must find the package peft, but: {error}; "
            "install it with `pip install 'esper-morphogenetic[peers]'`."
        ) from None
    shared = {"target_modules": list(adapter.targets), "lora_dropout": 0.0}
    if adapter.kind == "lora":
        rank, alpha = adapter.rank, adapter.scale * adapter.rank
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_bias=adapter.bias, **shared)
        with warnings.catch_warnings():
            # that a bias cannot be merged into a map without one; nothing is merged here
            warnings.filterwarnings("ignore", message=".*lora_bias=True")
            peft.inject_adapter_in_model(config, model)
        return
    assert adapter.total_steps is not None
    start = math.ceil(START_RATIO * adapter.rank)
    config = peft.AdaLoraConfig(
        init_r=start,
        target_r=adapter.rank,
        # its layers divide by the rank at the start
        lora_alpha=adapter.scale * start,
        total_step=adapter.total_steps,
        tinit=int(FIRST_FRAC * adapter.total_steps),
        tfinal=int(LAST_FRAC * adapter.total_steps),
        **shared,
    )
    _follow(model, peft.AdaLoraModel(model, config, "default"))


def _follow(model: nn.Module, tuner: Any) -> None:
    """Do at every optimizer step of this model what AdaLoRA asks for."""
    factors = [p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
    known, trained = weakref.ref(model), id(factors[0])
    # not as a submodule: the tuner holds the model
    model.__dict__["_adalora"] = tuner
    del tuner
    taken = 0

    def ours(optimizer: torch.optim.Optimizer) -> nn.Module | None:
        model = known()
        params = (id(p) for group in optimizer.param_groups for p in group["params"])
        return model if model is not None and trained in params else None

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if (model := ours(optimizer)) is not None:
            factors = [p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
            with torch.enable_grad():
                penalty = ORTHOGONALITY * torch.stack([_skew(p) for p in factors]).mean()
                for p, grad in zip(factors, torch.autograd.grad(penalty, factors), strict=True):
                    p.grad = grad if p.grad is None else p.grad + grad

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal taken
        if (model := ours(optimizer)) is not None:
            model.__dict__["_adalora"].update_and_allocate(taken)
            taken += 1

    del factors
    hooks = (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after))
    for hook in hooks:
        weakref.finalize(model, hook.remove)


def _skew(factor: Tensor) -> Tensor:
    """How far the directions of a factor are from orthonormal."""
    rows = factor if factor.shape[0] < factor.shape[1] else factor.T
    gram = rows @ rows.T
    distance: Tensor = torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device))
    return distance
