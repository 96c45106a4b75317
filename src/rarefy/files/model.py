"""Saving a model with all that its training needs, and loading it back, strictly."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.files import container, tree
from rarefy.files.checkpoint import ARRAYS, VERSION, Checkpoint, key, read
from rarefy.nn import SparseConvolution, SparseLayer, SparseLowRank
from rarefy.nn.layer import resize
from rarefy.pattern import Pattern


class Stateful(Protocol):
    """What is saved of a `Rewirer`."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    rewirer: Stateful | None = None,
    optimizer: Optimizer | None = None,
    extra: Any = None,
) -> None:
    """Write a model, and what its training needs to go on, to one safetensors file.

    Sparse layers are stored as values and pattern, never densified; everything else of the state_dict as it is, tied
    tensors once. The bytes depend on the state alone. The file appears whole or not at all.

    Args:
        model: on any device; wrappers (torch.compile, DistributedDataParallel) are looked through.
        rewirer, optimizer: their state is saved too, for a bitwise resume.
        extra: nested dicts, lists, tuples of tensors, numbers, strings, None: generator states, position in the data.
    Raises:
        ValueError: something that cannot be saved exactly, by name.
        OSError: the disk is full (`rarefy.files.DiskFull`) or the folder not writable; an older file stays as it was.
    """
    model = _unwrapped(model)
    tensors, aliases = _stored_once(path, model)
    modules = model.named_modules(remove_duplicate=False)
    sparse = {name: module for name, module in modules if isinstance(module, SparseLayer)}
    parents = dict(model.named_modules(remove_duplicate=False))
    layers = {}
    for name, layer in sparse.items():
        pattern = layer.pattern
        layers[name] = {
            "shape": list(pattern.shape),
            "block": list(pattern.block),
            "units": pattern.num_units,
            "digest": pattern.digest(),
        }
        if layer.transposed:
            layers[name]["transposed"] = True
        if isinstance(layer, SparseConvolution):
            layers[name]["kernel"] = list(layer.kernel_size)
        parent = parents[name.rpartition(".")[0]]
        if name and isinstance(parent, SparseLowRank):
            layers[name]["low_rank"] = {"rank": parent.rank, "scale": parent.scale}
        if key(name, "col_indices") in tensors:
            narrow = torch.uint16 if pattern.num_unit_cols <= 2**16 else torch.int32
            tensors[key(name, "col_indices")] = pattern.col_indices.to(narrow)
    trees = {
        "architecture": {"class": _class_name(model), "config": _config(model)},
        "rewirer": None if rewirer is None else rewirer.state_dict(),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "optimizer_of": None if optimizer is None else _description(model, optimizer),
        "extra": extra,
    }
    metadata = {"format": "pt", "rarefy.version": str(VERSION), "rarefy.layers": _json(layers)}
    if aliases:
        metadata["rarefy.aliases"] = _json(aliases)
    for part, content in trees.items():
        if content is not None:
            try:
                metadata[f"rarefy.{part}"] = _json(tree.encode(content, part, tensors))
            except ValueError as error:
                raise ValueError(f"{os.fspath(path)} cannot be written: {error}") from None
    container.write(path, tensors, metadata)


def load(path: str | os.PathLike[str]) -> dict[str, Tensor | Pattern]:
    """The model in a file, checked whole: {"fc.values": tensor, "fc.pattern": Pattern, "fc.bias": tensor, ...}.

    Names are those of the state_dict, but that a sparse layer's two index arrays are one `Pattern`; a tied tensor is
    the same object under each of its names. A safetensors file of other origin gives its tensors, if none of
    them is a sparse layer's. `rarefy.files.read` also gives optimizer, rewirer and extra state.

    Raises:
        ValueError, OSError: see `rarefy.files.read`.
    """
    found = read(path)
    patterns = {key(name, "pattern"): pattern for name, pattern in found.patterns.items()}
    return dict(sorted({**found.tensors, **patterns}.items()))


def load_into(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    rewirer: Stateful | None = None,
    optimizer: Optimizer | None = None,
) -> Checkpoint:
    """Load a file into a model of the same architecture and density, and what is given of its training, in place.

    Strict: every tensor of the model must be in the file and the reverse, with equal shape and dtype. Another pattern
    of as many units is taken over; of another number of units only with a rewirer whose layers change their size while
    they train (9.4). On any error everything is as it was before.

    Args:
        model: sparsified with the plan of the saved one, if that was sparse.
        rewirer, optimizer: the file must hold their state; an optimizer of the same class over the same parameters.
    Returns:
        The file's content, with its `extra`.
    Raises:
        ValueError: the file is not whole (see `rarefy.files.read`), or does not fit; names file, layer and reason.
    """
    model = _unwrapped(model)
    found = read(path)
    try:
        resizable = list(getattr(rewirer, "layers", {}).values()) if getattr(rewirer, "resizes", False) else []
        _check_model(found, model, resizable)
        if optimizer is not None:
            _check_optimizer(found, model, optimizer)
        if rewirer is not None and found.rewirer is None:
            raise ValueError("it holds no rewiring state: it was saved without rewirer=")
        undo = _remember(model, rewirer, optimizer)
        try:
            _make_room(found, model, resizable)
            model.load_state_dict(found.state_dict())
            if optimizer is not None and found.optimizer is not None:
                _load_optimizer(optimizer, found.optimizer)
            if rewirer is not None and found.rewirer is not None:
                rewirer.load_state_dict(found.rewirer)
        except BaseException:
            undo()
            raise
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        text = f"{type(error).__name__} {error}" if isinstance(error, KeyError | TypeError) else str(error)
        raise ValueError(f"{os.fspath(path)}: {text}") from error
    return found


# -- the model --------------------------------------------------------------------------------------------------------


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's or DistributedDataParallel's."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _class_name(thing: object) -> str:
    """With the package for those that everyone has; a user's class may move from a script to a module."""
    package = type(thing).__module__.partition(".")[0]
    return (
        f"{package}.{type(thing).__name__}" if package in ("rarefy", "torch", "transformers") else type(thing).__name__
    )


def _json(value: Any) -> str:
    return container.compact(dict(sorted(value.items())) if isinstance(value, dict) else value)


def _stored_once(path: str | os.PathLike[str], model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state_dict with each memory once, under its first name, and the other names of it -> that name."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{os.fspath(path)} cannot be written: the model's state {name} is no tensor "
                f"but a {type(tensor).__name__}"
            )
        if tensor.layout is torch.strided and not tensor.is_meta and tensor.numel():
            memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            if first.setdefault(memory, name) != name:
                aliases[name] = first[memory]
                continue
        tensors[name] = tensor
    return tensors, aliases


def _config(model: nn.Module) -> dict[str, Any] | None:
    """The settings a model was built from, where it keeps them: `model.config` of Hugging Face, or a dataclass."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "model_type") and callable(getattr(config, "to_dict", None)):
        plain = config.to_dict()
        for name in (
            "_name_or_path",
            "transformers_version",
        ):  # whence and by what it was loaded is no part of the state
            plain.pop(name, None)
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        plain = dataclasses.asdict(config)
    else:
        return None
    try:
        tree.encode(plain, "config", {})
    except ValueError:  # holds objects: then there are no settings that a file could say
        return None
    return plain


def _make_room(found: Checkpoint, model: nn.Module, resizable: Sequence[SparseLayer]) -> None:
    """Storage of the file's sizes in the layers that may have them."""
    for name, module in model.named_modules(remove_duplicate=False):
        if name in found.patterns and any(module is layer for layer in resizable):
            assert isinstance(module, SparseLayer)
            module.make_room(found.patterns[name].num_units)


def _check_model(found: Checkpoint, model: nn.Module, resizable: Sequence[SparseLayer] = ()) -> None:
    """Whether every tensor of the file has its place in the model and the reverse.

    Args:
        resizable: layers whose number of units may be another one.
    Raises:
        ValueError: the first difference, by layer.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, pattern in found.patterns.items():
        layer = modules.get(name)
        _check_layer(name or "the model", pattern, layer, any(layer is other for other in resizable))
    for name, module in modules.items():
        if isinstance(module, SparseLayer) and name not in found.patterns:
            reason = "its pattern is missing from the file"
            if key(name, "weight") in found.tensors:
                reason = "the model has it sparse, the file dense: load before rarefy.sparsify, or use another plan"
            elif key(name, "values") not in found.tensors:
                reason = "missing from the file, which is of another architecture"
            raise ValueError(f"{name or 'the model'}: {reason}")
    for name, module in modules.items():
        if isinstance(module, SparseLowRank) and (scale := found.low_rank.get(name)) != module.scale:
            raise ValueError(
                f"{name or 'the model'}: its low-rank part is scaled by {scale} in the file, by {module.scale} in the "
                "model: sparsify with the plan of the saved model"
            )
    saved, mine = found.state_dict(), model.state_dict()
    for name, tensor in mine.items():
        if name not in saved:
            raise ValueError(f"{name}: missing from the file, which is of another architecture")
        if tensor.is_meta:
            raise ValueError(f"{name}: the model is on the meta device: call model.to_empty(device='cpu') first")
        if name.rpartition(".")[2] in ARRAYS[1:]:
            continue  # checked as a pattern; the width of indices is free
        if key(name.rpartition(".")[0], "values") == name and any(
            modules[name.rpartition(".")[0]] is layer for layer in resizable
        ):
            tensor = tensor.new_empty(()).expand(saved[name].shape)  # of the size that it will have
        if tuple(tensor.shape) != tuple(saved[name].shape):
            raise ValueError(
                f"{name}: shape {tuple(saved[name].shape)} in the file, {tuple(tensor.shape)} in the model, "
                "which is of another architecture"
            )
        if tensor.dtype != saved[name].dtype:
            raise ValueError(
                f"{name}: {saved[name].dtype} in the file, {tensor.dtype} in the model: "
                f"call model.to({saved[name].dtype}) before loading, and convert afterwards"
            )
    for name in saved:
        if name not in mine:
            raise ValueError(f"{name}: the model, of another architecture, has no such parameter or buffer")


def _check_layer(name: str, pattern: Pattern, module: nn.Module | None, resizable: bool) -> None:
    if module is None:
        raise ValueError(f"{name}: the model, of another architecture, has no such layer")
    if not isinstance(module, SparseLayer):
        raise ValueError(
            f"{name}: the file has it sparse (density {pattern.density:.4g}), the model as {type(module).__name__}: "
            "first call rarefy.sparsify(model, plan) with the plan of the saved model"
        )
    shape = (module.out_features, module.in_features)
    if pattern.shape != shape:
        raise ValueError(f"{name}: {pattern.shape} in the file, {shape} in the model, which is of another architecture")
    if pattern.block != module.block or (pattern.num_units != module.num_units and not resizable):
        (b_r, b_c), (m_r, m_c) = pattern.block, module.block
        raise ValueError(
            f"{name}: {pattern.num_units} units of {b_r}x{b_c} in the file, {module.num_units} of {m_r}x{m_c} in the "
            "model: sparsify with the plan of the saved model"
        )


# -- optimizer --------------------------------------------------------------------------------------------------------


def _parameter_names(model: nn.Module, optimizer: Optimizer) -> list[list[str | None]]:
    """By group, in the optimizer's order; None for a parameter that the model does not have."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]


def _description(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """What an optimizer must be like to take over this one's state."""
    return {"class": _class_name(optimizer), "names": _parameter_names(model, optimizer)}


def _check_optimizer(found: Checkpoint, model: nn.Module, optimizer: Optimizer) -> None:
    """Whether the saved state belongs to this kind of optimizer over these parameters, in this order."""
    if found.optimizer is None or found.optimizer_of is None:
        raise ValueError("it holds no optimizer state: it was saved without optimizer=")
    saved, mine = found.optimizer_of, _description(model, optimizer)
    if saved["class"] != mine["class"]:
        raise ValueError(f"its optimizer state is of {saved['class']}, and the optimizer is {mine['class']}")
    if saved["names"] == mine["names"]:
        return
    sizes = [[len(group) for group in optimizer_of["names"]] for optimizer_of in (saved, mine)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"its optimizer has groups of {sizes[0]} parameters, this one of {sizes[1]}")
    groups = zip(saved["names"], mine["names"], strict=True)
    was, now = next(pair for group in groups for pair in zip(*group, strict=True) if pair[0] != pair[1])
    raise ValueError(
        f"its optimizer has {was} where this one has {now}: make it from the same parameters in the same order"
    )


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """`Optimizer.load_state_dict`, but that state keeps its dtypes, which torch would make the parameter's own (an
    integer age must stay one), and lies in memory as the parameter does: torch's fused optimizers take for granted that
    both have the same order, as of channels_last weights, and files have their own.
    """
    optimizer.load_state_dict(state)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    order = [i for group in state["param_groups"] for i in group["params"]]
    for i, parameter in zip(order, parameters, strict=True):
        if i in state["state"]:
            _keep_dtypes(optimizer.state[parameter], state["state"][i])
            _keep_order(optimizer.state[parameter], parameter)


def _keep_dtypes(current: Any, saved: Any) -> None:
    for name, item in saved.items() if isinstance(saved, dict) else enumerate(saved):
        if isinstance(item, Tensor) and item.dtype != current[name].dtype:
            current[name] = item.to(current[name].device, copy=True)
        elif isinstance(item, dict | list):
            _keep_dtypes(current[name], item)


def _keep_order(current: Any, parameter: Tensor) -> None:
    for name, item in current.items() if isinstance(current, dict) else enumerate(current):
        if isinstance(item, Tensor) and item.shape == parameter.shape and item.stride() != parameter.stride():
            current[name] = torch.empty_like(parameter, dtype=item.dtype, device=item.device).copy_(item)
        elif isinstance(item, dict | list):
            _keep_order(item, parameter)


# -- all or nothing ---------------------------------------------------------------------------------------------------


def _remember(model: nn.Module, rewirer: Stateful | None, optimizer: Optimizer | None) -> Any:
    """A function that puts everything back as it is now. Holds a copy of the model's state, O(nnz), until then."""
    tensors = [(tensor, tensor.clone()) for tensor in model.state_dict().values()]
    layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
    patterns = [(layer, layer.pattern if layer.has_pattern else None) for layer in layers]
    rewiring = None if rewirer is None else rewirer.state_dict()
    # load_state_dict of an optimizer replaces these two and leaves the old ones alone
    stepping = None if optimizer is None else (optimizer.state, optimizer.param_groups)

    values = [(layer, layer.values.data) for layer in layers]

    def undo() -> None:
        for layer, storage in values:
            if layer.values.shape != storage.shape:
                resize(layer.values, storage)
        with torch.no_grad():
            for tensor, before in tensors:
                tensor.copy_(before)
        for layer, pattern in patterns:
            layer.has_pattern = pattern is not None
            if pattern is not None:
                layer.set_pattern(pattern)
        if optimizer is not None and stepping is not None:
            optimizer.state, optimizer.param_groups = stepping
        if rewirer is not None and rewiring is not None:
            rewirer.load_state_dict(rewiring)

    return undo
