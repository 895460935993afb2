"""What a host does, read from its own code: between the ends of a span by `torch.fx`.

What is traced is the module that runs both ends, with the modules in it as single calls. The host
is not touched: the trace works on a shallow twin in evaluation mode, without hooks and without the
lattice's layers.
"""

import ast
import inspect
import operator
import re
import textwrap
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from esper.seeds.kasmina import KasminaLayer

# torch's own layers that fx cannot follow as a whole, and the method that runs their two Linears
_FEEDFORWARD = {nn.TransformerEncoderLayer: "_ff_block", nn.TransformerDecoderLayer: "_ff_block"}
_Twins = dict[nn.Module, nn.Module]


class UnprovenError(ValueError):
    """The host's code does not show what a change of it would rely on; the message says why."""


class HostTrace:
    """One trace of the module that runs both ends of a span.

    Args:
        root: The traced twin.
        graph: What it does.
        twins: The twin of each of the host's modules.
        first: Where the span begins.
        last: Where it ends.

    Raises:
        UnprovenError: If the ends are not called once each.
    """

    def __init__(
        self, root: nn.Module, graph: fx.Graph, twins: _Twins, first: nn.Module, last: nn.Module
    ) -> None:
        self._nodes = list(graph.nodes)
        self._called = {
            n: root.get_submodule(str(n.target)) for n in self._nodes if n.op == "call_module"
        }
        self._originals = {twin: original for original, twin in twins.items()}
        self._first, self._last = (self._only_call(twins[end]) for end in (first, last))

    def _only_call(self, twin: nn.Module) -> fx.Node:
        calls: list[fx.Node] = [n for n, module in self._called.items() if module is twin]
        if len(calls) != 1:
            raise UnprovenError(f"an end of the span is called {len(calls)} times")
        weights = f"{calls[0].target}."
        read = [n for n in self._nodes if n.op == "get_attr" and n.users]
        if any(str(n.target).startswith(weights) for n in read):
            raise UnprovenError("the weights at an end of the span are read by other code as well")
        return calls[0]

    def between(self) -> list[nn.Module]:
        """The host's modules that the hidden activations pass through."""
        return self._modules(self._between())

    def after(self) -> list[nn.Module]:
        """The host's modules that the span's result passes through on its way out."""
        return self._modules(self._after())

    def _modules(self, nodes: Collection[fx.Node]) -> list[nn.Module]:
        return [self._originals[self._called[n]] for n in nodes if n in self._called]

    def _between(self) -> list[fx.Node]:
        """The calls from the first end to the last, if nothing else comes in or goes out there."""
        inside = {self._first: None}
        for node in self._nodes:
            if node is not self._last and not inside.keys().isdisjoint(node.all_input_nodes):
                inside[node] = None
        if any(not node.users for node in inside):
            raise UnprovenError("the hidden activations are also used elsewhere")
        calls = list(inside)[1:]
        if any(n not in inside for node in calls for n in node.all_input_nodes):
            raise UnprovenError("other values enter between its ends")
        if len(self._last.args) + len(self._last.kwargs) != 1:
            raise UnprovenError("its last module takes more than one input")
        return calls

    def require_elementwise(self, function: Callable[[Tensor], Tensor], z: Tensor) -> None:
        """Check that what lies between the ends is `function` of each hidden activation alone.

        Args:
            function: Elementwise.
            z: Hidden activations of many sizes, as wide as the hidden layer is to be.

        Raises:
            UnprovenError: If it is not, or cannot be shown to be.
        """
        values: dict[fx.Node, Any] = {self._first: z}
        for node in self._between():
            module = self._called.get(node)
            if module is not None and any(True for _ in module.parameters()):
                raise UnprovenError("a module between its ends has parameters")
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            try:
                values[node] = _call(node, module, args, kwargs)
            # the host's own code, on a width that it was perhaps not made for
            except Exception as error:
                raise UnprovenError(f"'{node}' cannot work on a wider input: {error}") from error
        result, expected = values[self._last.all_input_nodes[0]], function(z)
        same = isinstance(result, Tensor) and result.shape == expected.shape
        if not same or not torch.allclose(result.to(z), expected, rtol=1e-9, atol=1e-12):
            raise UnprovenError("the host computes something else there")

    def input_index(self) -> int:
        """Which argument the first end reads, if what the last end computes is returned.

        Raises:
            UnprovenError: If the first end reads something else, or something else is returned.
        """
        self._after()
        source = self._first.args[0] if self._first.args else None
        # only arguments are picked from a placeholder: there is one, which holds them all
        if isinstance(source, fx.Node) and source.target is operator.getitem:
            given, index = source.args
            if isinstance(given, fx.Node) and given.op == "placeholder":
                assert isinstance(index, int)
                return index
        raise UnprovenError("its first module does not read an argument as it comes")

    def _after(self) -> list[fx.Node]:
        """The calls from the last end to the output, if they change nothing."""
        node, passed = self._nodes[-1].args[0], []
        while node is not self._last:
            if not isinstance(node, fx.Node) or not _is_dropout(node, self._called.get(node)):
                raise UnprovenError("what its last module computes is not what is returned")
            passed.append(node)
            node = node.all_input_nodes[0]
        return passed


def trace_host(parent: nn.Module, first: nn.Module, last: nn.Module) -> list[HostTrace]:
    """Trace a module that runs both ends of a span.

    Returns:
        A trace of its forward with all arguments given, and where some are optional another
        with the required ones alone; one of them where the other is impossible.

    Raises:
        UnprovenError: If it cannot be traced, or does not call each end once.
    """
    method = _FEEDFORWARD.get(type(parent), "forward")
    parameters = [
        p
        for p in inspect.signature(getattr(parent, method)).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    required = [p for p in parameters if p.default is p.empty]
    traces, failure = [], None
    for given in [parameters] if parameters == required else [parameters, required]:
        twins: _Twins = {}
        # the host's code may break a trace in any way
        try:
            root = _Caller(_twin(parent, twins), method, parameters, given)
            opened = {
                twins[m]
                for m in parent.modules()
                if m in twins and {first, last} & {*m.modules()} and m not in (first, last)
            }
            graph = _HostTracer(opened).trace(root)
        except Exception as error:
            failure = error
        else:
            traces.append(HostTrace(root, graph, twins, first, last))
    if not traces:
        raise UnprovenError(f"torch.fx cannot trace it: {failure}") from failure
    return traces


class _Caller(nn.Module):
    """Calls a method of a module with chosen arguments, which come as one list."""

    def __init__(
        self, host: nn.Module, method: str,
        signature: list[inspect.Parameter], given: list[inspect.Parameter],
    ) -> None:  # fmt: skip
        super().__init__()
        self.host, self.method, self.signature, self.given = host, method, signature, given

    def forward(self, inputs: Any) -> Any:
        args, kwargs = [], {}
        for i, p in enumerate(self.signature):
            value = inputs[i] if p in self.given else p.default
            if p.kind is p.KEYWORD_ONLY:
                kwargs[p.name] = value
            else:
                args.append(value)
        return getattr(self.host, self.method)(*args, **kwargs)


class _HostTracer(fx.Tracer):
    """Keeps every module as one call, but for those that hold an end of the span."""

    def __init__(self, opened: set[nn.Module]) -> None:
        super().__init__()
        self._opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self._opened


def _twin(module: nn.Module, twins: _Twins) -> nn.Module:
    """A copy that shares all tensors, to be traced instead of the module."""
    if module not in twins:
        twin = twins[module] = object.__new__(type(module))
        twin.__dict__.update(module.__dict__)
        twin.__dict__ |= {"training": False, "_forward_hooks": {}, "_forward_pre_hooks": {}}
        twin.__dict__["_modules"] = {
            name: None if child is None else _twin(child, twins)
            for name, child in module._modules.items()
            if not isinstance(child, KasminaLayer)
        }
    return twins[module]


def _call(node: fx.Node, module: nn.Module | None, args: Any, kwargs: Any) -> Any:
    if module is not None:
        return module(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _is_dropout(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a call leaves its input as it is in evaluation mode."""
    if node.target is F.dropout:
        return node.kwargs.get("training") is False
    return isinstance(module, nn.Dropout | nn.Identity)


def gives_tuple(module: nn.Module) -> bool:
    """Whether the code of a module's forward returns a tuple somewhere."""
    try:
        tree = ast.parse(_source(inspect.unwrap(type(module).forward)))
    except SyntaxError:
        # a lambda's source is that of the line that it stands in
        return False
    return any(isinstance(r.value, ast.Tuple) for part in tree.body for r in _returns(part))


def _returns(node: ast.AST) -> Iterator[ast.Return]:
    """The return statements of a function, without those of functions inside it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Return):
            yield child
        elif not isinstance(child, ast.FunctionDef):
            yield from _returns(child)


def reads_parts(model: nn.Module, path: str) -> bool:
    """Whether the code around a module reads more of it than its output."""
    parent, _, name = path.rpartition(".")
    code = _source(type(model.get_submodule(parent)))
    return re.search(rf"self\.{re.escape(name)}\s*[.\[]", code) is not None


def _source(of: Callable[..., Any]) -> str:
    try:
        return textwrap.dedent(inspect.getsource(of))
    # compiled, or typed in
    except (OSError, TypeError):
        return ""
