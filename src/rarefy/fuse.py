"""MLPs of other people's models, recognised by what they compute, and run as one call of the kernels.

Recognised are modules whose forward is `down(act(up(x)))` or `down(act(gate(x)) * up(x))` over sparse layers of their
own, with dropout where it does no harm: traced with torch.fx, in training and in evaluation, the forward must be these
steps and nothing else. That fits Hugging Face's GPT2MLP, LlamaMLP and its kin, and most people's own. In an
nn.Sequential the layers are looked for in a row, at every call. What is not recognised for sure stays as it is.

How: the module's class becomes a subclass of its own class, made once for each, which FSDP2 does too. So names,
parameters, state dict, isinstance, copies, DDP and torch.compile are as before; and `module.forward` is still a method,
where a wrapper would change names and a patched instance would bind copies to the module that they were copied from.
Its forward runs the fused call only while that is the same: it steps aside for the original where a layer or anything
between has hooks, dropout would drop, an activation has been replaced, or a layer is no longer sparse.
"""

from __future__ import annotations

import copy
import functools
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rarefy.nn import SparseLinear, SquaredReLU, gated_mlp, mlp
from rarefy.nn.mlp import has_hooks, is_plain

_TRANSFORMERS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "SiLUActivation": "silu",
    "ReLUSquaredActivation": "squared_relu",
}
"""Classes of transformers.activations, which need not be installed."""


def activation_of(module: nn.Module) -> str | None:
    """The name of the activation that the module computes, if it is one of those that can be fused."""
    kind = type(module)
    if kind is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    if kind is nn.SiLU:
        return "silu"
    if kind is nn.ReLU:
        return "relu"
    if kind is SquaredReLU:
        return "squared_relu"
    return _TRANSFORMERS.get(kind.__name__) if kind.__module__ == "transformers.activations" else None


def _function(node: Any) -> str | None:
    """The same for a call of a function."""
    if len(node.args) != 1:
        return None
    if node.target is F.gelu:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(node.kwargs.get("approximate", "none")))
    if node.kwargs.get("inplace"):
        return None
    return {F.silu: "silu", F.relu: "relu", torch.relu: "relu"}.get(node.target)


def _passes(module: nn.Module) -> bool:
    """Whether it can stand between the activation and the last layer."""
    return type(module) in (nn.Dropout, nn.Identity)


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and module.training and module.p > 0


@dataclass(frozen=True)
class Recipe:
    """Names of a module's children, and what it computes with them."""

    gate: str | None
    up: str
    act: str | None
    """None: a function."""
    activation: str
    inside: tuple[str, ...]
    """Between the activation and the last layer."""
    down: str
    after: tuple[str, ...]


def _is_call(node: Any, op: str) -> bool:
    return isinstance(node, fx.Node) and node.op == op


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def recognise(module: nn.Module) -> Recipe | None:
    """What the module's forward computes, if that is an MLP over sparse layers of its own."""
    children = dict(module.named_children())
    if sum(isinstance(child, SparseLinear) for child in children.values()) not in (2, 3):
        return None
    found = []
    try:
        for mode in (True, False):
            twin = copy.copy(module)  # what forward writes to itself must not reach the module
            twin.training = mode
            before = dict(twin.__dict__)
            found.append(_read(_Tracer().trace(twin), children))
            after = twin.__dict__
            if before.keys() != after.keys() or any(after[name] is not kept for name, kept in before.items()):
                return None  # it keeps something of its input, which the fused call would not
    except Exception:  # whatever other people's forward does with what is no tensor
        return None
    return found[0] if found[0] == found[1] else None


def _read(graph: fx.Graph, children: dict[str, nn.Module]) -> Recipe | None:
    nodes: list[Any] = list(graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    if len(inputs) != 1 or inputs[0].args:  # of an argument with a default only that is known
        return None
    x, used = inputs[0], {inputs[0], nodes[-1]}

    def call(node: Any, fits: Any) -> str | None:
        """The child that the node calls on one thing, if it fits."""
        if not _is_call(node, "call_module") or len(node.args) != 1 or node.kwargs:
            return None
        name = str(node.target)
        if name not in children or not fits(children[name]):
            return None
        used.add(node)
        return name

    def passing(node: Any) -> tuple[Any, tuple[str, ...]]:
        names: list[str] = []
        while (name := call(node, _passes)) is not None:
            names.insert(0, name)
            node = node.args[0]
        return node, tuple(names)

    def sparse(node: Any) -> str | None:
        return call(node, lambda child: isinstance(child, SparseLinear))

    node: Any
    node, after = passing(nodes[-1].args[0])
    down = sparse(node)
    if down is None:
        return None
    node, inside = passing(node.args[0])
    up = None
    if _is_call(node, "call_function") and node.target in (operator.mul, torch.mul):
        used.add(node)
        if len(node.args) != 2 or node.kwargs:
            return None
        factors = [(side, sparse(side)) for side in node.args]
        ups = [at for at, (side, name) in enumerate(factors) if name is not None and side.args[0] is x]
        if len(ups) != 1:
            return None
        up, node = factors[ups[0]][1], node.args[1 - ups[0]]
    act = call(node, lambda child: activation_of(child) is not None)
    activation = activation_of(children[act]) if act is not None else None
    if act is None and _is_call(node, "call_function"):
        activation = _function(node)
        used.add(node)
    if activation is None:
        return None
    first = sparse(node.args[0])
    if first is None or node.args[0].args[0] is not x or used != set(nodes):
        return None
    gate, up = (None, first) if up is None else (first, up)
    return Recipe(gate, up, act, activation, inside, down, after)


class FusedMLP:
    """What the classes of fused modules have in common; see the file's docstring."""

    original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class cannot be imported, so copies and pickles make it anew."""
        _, _, *rest = super().__reduce_ex__(protocol)
        return _blank, (self.original,), *rest


def _blank(original: type[nn.Module]) -> nn.Module:
    kind = _class_of(original)
    return kind.__new__(kind)


@functools.cache
def _class_of(original: type[nn.Module]) -> Any:
    """The subclass of a module's class that runs fused."""

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        recipe = self.fused_recipe
        if len(args) != 1 or kwargs or not _holds(self, recipe):
            return original.forward(self, *args, **kwargs)
        return _run(self, recipe, args[0])

    body = {"original": original, "forward": _sequential if original is nn.Sequential else forward}
    kind: Any = type(original.__name__, (FusedMLP, original), body)
    kind.__module__, kind.__qualname__ = original.__module__, original.__qualname__
    return kind


def _holds(module: nn.Module, recipe: Recipe) -> bool:
    """Whether the module still computes what it was recognised for, and no one looks on."""
    children: dict[str, Any] = module._modules
    if any(child is None or has_hooks(child) for child in children.values()):
        return False
    if any(_drops(children[name]) for name in recipe.inside):
        return False
    if recipe.act is not None and activation_of(children[recipe.act]) != recipe.activation:
        return False
    layers = [name for name in (recipe.gate, recipe.up, recipe.down) if name is not None]
    return all(is_plain(children[name]) for name in layers)


def _run(module: Any, recipe: Recipe, x: Tensor) -> Tensor:
    up, down = module._modules[recipe.up], module._modules[recipe.down]
    if recipe.gate is None:
        y = mlp(x, up, recipe.activation, down)
    else:
        y = gated_mlp(x, module._modules[recipe.gate], up, recipe.activation, down)
    for name in recipe.after:
        y = module._modules[name](y)
    return y


def _ends_at(children: list[nn.Module], first: int) -> int | None:
    """The place of the last layer of an MLP that begins at `first`."""
    if not isinstance(children[first], SparseLinear) or len(children) < first + 3:
        return None
    if activation_of(children[first + 1]) is None:
        return None
    last = first + 2
    while last < len(children) and _passes(children[last]):
        last += 1
    return last if last < len(children) and isinstance(children[last], SparseLinear) else None


def _sequential(self: Any, input: Any) -> Any:
    """nn.Sequential's forward, with the MLPs in it fused: looked for anew, as a Sequential may be changed or sliced."""
    children, at = list(self._modules.values()), 0
    while at < len(children):
        last = _ends_at(children, at)
        if last is None:
            input, at = children[at](input), at + 1
            continue
        span = children[at : last + 1]
        plain = is_plain(span[0]) and is_plain(span[-1])
        if plain and not any(has_hooks(child) or _drops(child) for child in span[1:-1]):
            activation = activation_of(span[1])
            assert activation is not None
            input = mlp(input, span[0], activation, span[-1])
        else:
            for child in span:
                input = child(input)
        at = last + 1
    return input


def fuse(model: nn.Module) -> list[str]:
    """Let the model's sparse MLPs run fused, in place; the names of the modules that do, in the model's order."""
    names = []
    module: Any
    for name, module in model.named_modules():
        if not isinstance(module, FusedMLP):
            if type(module) is nn.Sequential:
                children = list(module.children())
                if all(_ends_at(children, at) is None for at in range(len(children))):
                    continue
            else:
                recipe = recognise(module)
                if recipe is None:
                    continue
                module.fused_recipe = recipe
            module.__class__ = _class_of(type(module))
        names.append(name)
    return names


def hidden_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """(up, down) names of the layers around the hidden neurons of each fused MLP; a gated one has two pairs."""
    pairs: list[tuple[str, str, str]] = []
    fused: list[tuple[str, Any]] = [(name, m) for name, m in model.named_modules() if isinstance(m, FusedMLP)]
    for name, module in fused:
        if module.original is nn.Sequential:
            children = list(module.named_children())
            inside = [child for _, child in children]
            ends = [(at, _ends_at(inside, at)) for at in range(len(inside))]
            pairs += [(name, children[at][0], children[last][0]) for at, last in ends if last is not None]
        else:
            recipe = module.fused_recipe
            pairs += [(name, first, recipe.down) for first in (recipe.gate, recipe.up) if first is not None]
    return [(f"{name}.{up}".lstrip("."), f"{name}.{down}".lstrip(".")) for name, up, down in pairs]
