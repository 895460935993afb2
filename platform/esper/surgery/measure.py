"""One batch seen from every site: what seeds read there, and what change of it the loss wants.

The host runs once in eval mode, and no gradient of any parameter is touched.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from esper.seeds.local_rows import whole
from esper.seeds.matching import MAX_ROWS, Rows
from esper.seeds.outputs import first_of, with_first
from esper.surgery.modes import evaluating

if TYPE_CHECKING:
    from esper.surgery.lattice import Attached

# the mean loss of one batch, made by a forward pass of the model
Loss = Callable[[], Tensor]


def measure_rows(
    model: nn.Module, attached: Mapping[str, "Attached"], loss: Loss
) -> dict[str, Rows]:
    """Run the batch, and collect at most `MAX_ROWS` rows of every site.

    Args:
        model: The host.
        attached: Its sites.
        loss: Gives the mean loss of a batch.

    Raises:
        ValueError: If a site did not take part, or the loss is no scalar with a gradient.
    """
    seen: dict[str, dict[str, Tensor]] = {name: {} for name in attached}
    hooks = []
    for name, a in attached.items():
        first, last = model.get_submodule(a.site.first), model.get_submodule(a.site.last)
        hooks.append(first.register_forward_pre_hook(_note(seen[name], "source")))
        hooks.append(last.register_forward_pre_hook(_note(seen[name], "inputs")))
        hooks.append(last.register_forward_hook(_output(seen[name])))
    try:
        with evaluating(model), torch.enable_grad():
            total = loss()
            missing = [name for name, noted in seen.items() if "output" not in noted]
            if missing:
                raise ValueError(
                    f"measure must run the model, but {', '.join(missing)} did not take part; "
                    "give a function that returns the mean loss of a batch."
                )
            if total.ndim or not total.requires_grad:
                raise ValueError(
                    "measure must return the mean loss as a scalar with a gradient, but got shape "
                    f"{tuple(total.shape)}, requires_grad {total.requires_grad}."
                )
            outputs = [noted["output"] for noted in seen.values()]
            gradients = torch.autograd.grad(total, outputs, materialize_grads=True)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: _rows(a, model.get_submodule(a.site.last), noted, gradient)
        for (name, a), noted, gradient in zip(
            attached.items(), seen.values(), gradients, strict=True
        )
    }


def _note(noted: dict[str, Tensor], key: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            # of a column-parallel module every process has the whole input
            noted[key] = whole(args[0].detach())

    return hook


def _output(noted: dict[str, Tensor]) -> Callable[..., Any]:
    """Note the site's output with its seeds; nobody may change it in place after that."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        y = first_of(output)
        if not y.requires_grad:
            # behind a frozen host nothing else asks for this gradient
            y = y.detach().requires_grad_()
        noted["output"] = y
        return with_first(output, y.clone())

    return hook


def _rows(a: "Attached", last: nn.Module, noted: dict[str, Tensor], gradient: Tensor) -> Rows:
    layer = a.layer
    output, gradient = layer.rows(noted["output"].detach()), layer.rows(gradient)
    total = len(output)
    at = torch.linspace(0, total - 1, min(total, MAX_ROWS), device=output.device).round().long()
    read = output if layer.geometry == "chunk" else layer.rows(noted["source"])
    source = layer.all_channels(read[at]) if layer.geometry == "chunk" else read[at]
    source = source.float()
    inputs = noted.get("inputs")
    trains = any(p.requires_grad for p in last.parameters(recurse=False))
    # a frozen module cannot even shift its output
    known = [torch.ones(len(at), int(trains), device=source.device)]
    if trains and inputs is not None:
        flat = layer.rows(inputs)
        # a convolution's outputs see several of its inputs: only its bias is known then
        if isinstance(last, nn.Linear) or hasattr(last, "nf"):
            # as many features as rows would explain anything
            if 2 * flat.shape[1] <= len(at):
                known.append(flat[at].float())
            else:
                warnings.warn(
                    f"{len(at)} rows were measured at '{a.site.name}', whose module weighs "
                    f"{flat.shape[1]} features: too few to tell what the host can express by "
                    "itself, so nothing is taken away; measure at least twice as many "
                    f"(growth.measured_samples), up to {MAX_ROWS}.",
                    stacklevel=2,
                )
    if layer.geometry == "span":
        units = layer.awake().nonzero()[:, 0]
        if len(units):
            known.append(layer.span_hidden(source, units).float())
    # the loss is a mean over the samples: undone, so that a gain does not depend on their number
    wanted = -total * layer.all_channels(gradient[at]).float()
    return Rows(source.detach(), torch.cat(known, 1).detach(), wanted.detach())
