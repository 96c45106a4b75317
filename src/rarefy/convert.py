"""Making an existing model sparse: modules swapped in place, values only."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rarefy.fuse import fuse, hidden_pairs
from rarefy.init import drawn_pattern, grouped_pattern, magnitude_pattern, row_rescale
from rarefy.nn import SparseConvolution, SparseLayer, SparseLinear, SparseLowRank
from rarefy.nn.conv import SPARSE_TYPES
from rarefy.nn.layer import INDEX_BUFFERS, gather_units
from rarefy.pattern import Pattern
from rarefy.plan import ASSUMED_TOKENS, Decision, Plan, is_conv1d, thresholds
from rarefy.rewiring import Rewirer, choose_compute
from rarefy.sampling import keyed_generator


def sparsify(model: nn.Module, plan: Plan, sample: Any = None, *, measure: bool | None = None) -> Rewirer:
    """Replace the model's linear layers and convolutions by sparse ones, as the plan says, and return the engine that
    will rewire them.

    Create the optimizer afterwards, then `rewirer.attach(optimizer, total_steps=...)`.

    Args:
        model: changed in place. Layers that cannot be converted stay dense; `Rewirer.left_dense` lists them with the
            reason.
            On the meta device no dense weight is ever allocated: call `to_empty`, then `reset_parameters` on the
                sparse layers (of a `SparseLowRank` on itself, which sees to both parts).
        sample: an example input. With it every distinct shape is timed on the spot, and a layer that sparse would
            slow down stays dense, with the figures as its reason; without it nothing is timed.
        measure: False: take the times from the cost model instead; True: time on the spot even without a sample. See
            `Plan.decide`.
    Raises:
        ValueError: as `Plan.decide`, or `init="magnitude"` on the meta device. The model is then unchanged.

    For DistributedDataParallel wrap this very model, compiled or not, rather than a larger one that contains it: DDP
    asks only what it wraps which buffers to leave alone.

    MLPs whose layers all became sparse run as one call from then on (`rarefy.fuse`); `Rewirer.fused` names them. Names,
    parameters and results are as before.

    With `plan.low_rank` a layer `X` becomes a `SparseLowRank`, whose sparse part the engine knows as `X.sparse`.

    Kept values are the model's own, scaled by 1 / sqrt(row density) unless `plan.rescale` is off (rewiring rule 3.2).
    """
    decisions = plan.decide(model, sample, measure=measure)
    modules = dict(model.named_modules())
    layers: dict[str, SparseLayer] = {}
    made: dict[str, nn.Module] = {}
    for decision in decisions:
        if not decision.is_sparse:
            continue
        module = modules[decision.name]
        if isinstance(module, SparseLowRank):
            layers[f"{decision.name}.sparse".lstrip(".")] = module.sparse
            continue
        if isinstance(module, SparseLayer):
            layers[decision.name] = module
            continue
        layer = _sparse_twin(module, decision, plan)
        if decision.rank:
            assert isinstance(layer, SparseLinear)
            made[decision.name], layers[f"{decision.name}.sparse"] = _with_low_rank(layer, decision, plan), layer
        else:
            made[decision.name] = layers[decision.name] = layer
    for name, module in made.items():
        _replace(model, modules[name], module)
    left_dense = {decision.name: decision.why_dense for decision in decisions if not decision.is_sparse}
    if not layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(left_dense.items())[:5])
        warnings.warn(f"no layer became sparse ({reasons})", stacklevel=2)
    # DDP broadcasts buffers from rank 0: that crashes on uint16, and would overwrite patterns silently (rewiring rule
    # 8.2).
    indices = [f"{name}.{buffer}" for name in layers for buffer in (*INDEX_BUFFERS, "sink")]
    indices += [f"_orig_mod.{index}" for index in indices]  # the names that DDP sees in a compiled model
    ignored = [*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *indices]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    if plan.block == "auto":  # what the engine keeps can make the same network again, on any machine
        plan = plan.settled([decision.row() for decision in decisions])
    fresh = {d.name: d for d in decisions if d.name in made and not plan.keeps_sizes}
    budget = None
    if fresh:
        budget = plan.budget({name: d.dims for name, d in fresh.items()}, {name: d.block for name, d in fresh.items()})
    fused = fuse(model)
    tokens = {d.name: d.tokens or ASSUMED_TOKENS for d in decisions}
    convolutions = {d.name: d.convolution for d in decisions if d.convolution is not None}
    dense_above = thresholds(layers, plan.dense_above, tokens, convolutions=convolutions)
    for name, layer in layers.items():
        choose_compute(layer, dense_above.get(name))
    return Rewirer(
        layers,
        plan.method,
        seed=plan.seed,
        plan=plan,
        budget=budget,
        left_dense=left_dense,
        fused=fused,
        balance={name: plan.groups(name.removesuffix(".sparse")) for name in layers},
        pairs=hidden_pairs(model),
        dense_above=dense_above,
    )


def _seed(plan: Plan, name: str) -> int:
    return int(keyed_generator(plan.seed, "first pattern", name).integers(2**62))


def _sparse_twin(module: nn.Module, decision: Decision, plan: Plan) -> SparseLayer:
    """The sparse layer that takes the place of a dense one."""
    weight = cast(Tensor, module.weight).detach()
    weight = weight.T if is_conv1d(module) else weight.flatten(1)
    if weight.device.type == "meta" and plan.first_pattern == "magnitude":
        raise ValueError(
            f"init: 'magnitude' needs weights, and {decision.name} is on the meta device; use another init, "
            "or load the weights first"
        )
    bias = cast("nn.Parameter | None", module.bias)
    assert decision.units is not None
    kind = SPARSE_TYPES.get(type(module), SparseLinear)
    layer = kind.__new__(kind)
    layer._allocate(decision.shape, decision.block, decision.units, bias is not None, weight.device, weight.dtype)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        assert isinstance(layer, SparseConvolution)
        layer.take_geometry(module)
    layer.transposed = is_conv1d(module)
    layer.pattern_seed = _seed(plan, decision.name)
    layer.pattern_init = "random" if plan.first_pattern == "magnitude" else plan.first_pattern
    layer.pattern_groups = plan.groups(decision.name)
    if weight.device.type != "meta":
        pattern = _first_pattern(weight, decision, plan)
        layer.set_pattern(pattern)
        with torch.no_grad():
            values = gather_units(weight, pattern)
            if plan.rescale:
                values = values * row_rescale(pattern).view(-1, *[1] * (values.dim() - 1)).to(values)
            layer.values.copy_(values)
    layer.bias = bias  # the same parameter: it may be tied to another, or frozen
    layer.values.requires_grad_(cast(Tensor, module.weight).requires_grad)
    return layer.train(module.training)


def _first_pattern(weight: Tensor, decision: Decision, plan: Plan) -> Pattern:
    """By the plan's `init`, keyed by seed and name (rewiring rule 3.1)."""
    assert decision.units is not None
    generator = torch.Generator().manual_seed(_seed(plan, decision.name))

    def draw(shape: tuple[int, int], units: int, group: int) -> Pattern:
        if plan.first_pattern == "magnitude":
            return magnitude_pattern(weight[group * shape[0] : (group + 1) * shape[0]], units, decision.block)
        return drawn_pattern(plan.first_pattern, shape, units, decision.block, generator=generator)

    return grouped_pattern(draw, decision.shape, decision.units, decision.block, plan.groups(decision.name))


def _with_low_rank(sparse: SparseLinear, decision: Decision, plan: Plan) -> SparseLowRank:
    """The layer that adds a low-rank part, zero at first: it computes what the sparse one does."""
    generator = torch.Generator().manual_seed(_seed(plan, f"{decision.name} low rank"))
    layer = SparseLowRank.around(sparse, rank=decision.rank, alpha=plan.low_rank_alpha, generator=generator)
    for part in (layer.a, layer.b):
        part.requires_grad_(sparse.values.requires_grad)
    return layer


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever the model has `old`, under every name."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = new
