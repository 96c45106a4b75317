"""What a layer costs, by counting: bytes, FLOPs, rows of input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.cost.convolution import Convolution
from rarefy.nn import SparseConvolution, SparseLayer
from rarefy.nn.low_rank import low_rank_weights
from rarefy.ops import index_dtype
from rarefy.pattern import unit_grid


def layer_flops(nnz: int) -> int:
    """FLOPs a token of training: forward, input gradient, weight gradient, a multiply and an add each."""
    return 6 * nnz


def layer_bytes(
    shape: tuple[int, int],
    units: int | None,
    block: tuple[int, int],
    value_bytes: int = 4,
    *,
    rank: int = 0,
    computes_dense: bool = False,
    groups: int = 1,
) -> int:
    """Bytes of a layer's weights; `units` None: dense. Of a sparse layer: values, every index tensor it holds (one that
    computes dense has no list of units by column, a convolution with groups a second index), and the low-rank part
    beside it.
    """
    if units is None:
        return shape[0] * shape[1] * value_bytes
    rows, cols = unit_grid(shape, block)
    narrow = index_dtype(rows, cols).itemsize
    index = narrow if computes_dense else 2 * narrow + 4
    sparse = units * (block[0] * block[1] * value_bytes + index) + (rows + cols + 2) * 4
    if groups > 1 and not computes_dense:
        sparse += layer_bytes((shape[0], groups * shape[1]), units, block, 0)
    return sparse + low_rank_weights(shape, rank) * value_bytes


def tokens_per_layer(model: nn.Module, sample: Any, names: Iterable[str]) -> dict[str, int]:
    """Rows of input that each named layer sees in one forward of `sample`, of a convolution output pixels; 0 for a
    layer that is not called as one, and for one over three axes.

    Args:
        sample: as for `watch_inputs`.
    """
    tokens = dict.fromkeys(names, 0)

    def count(name: str, module: nn.Module, x: Tensor) -> None:
        if isinstance(module, nn.Conv1d | nn.Conv2d | SparseConvolution):
            tokens[name] += Convolution.of(module, x.shape).pixels
        elif not isinstance(module, nn.Conv3d) and x.dim() and x.shape[-1]:
            tokens[name] += x.numel() // x.shape[-1]

    watch_inputs(model, sample, tokens, count)
    return tokens


def convolutions_per_layer(model: nn.Module, sample: Any, names: Iterable[str]) -> dict[str, Convolution]:
    """What each named convolution does in one forward of `sample`, at its first call if it has several.

    Args:
        sample: as for `watch_inputs`.
    """
    found: dict[str, Convolution] = {}

    def note(name: str, module: nn.Module, x: Tensor) -> None:
        assert isinstance(module, nn.Conv1d | nn.Conv2d | SparseConvolution)
        found.setdefault(name, Convolution.of(module, x.shape, _channels_last(x, len(module.kernel_size))))

    watch_inputs(model, sample, names, note)
    return found


def _channels_last(x: Tensor, axes: int) -> bool:
    """Whether a pixel's channels lie side by side, in images with N or without.

    Assumed of images on the meta device, whose layout norms and operators without a kernel there do not keep.
    """
    if x.device.type == "meta" and axes == 2:
        return True
    images = x if x.dim() == 2 + axes else x[None]
    images = images if axes == 2 else images.unsqueeze(2)
    return images.is_contiguous(memory_format=torch.channels_last)


def watch_inputs(
    model: nn.Module, sample: Any, names: Iterable[str], see: Callable[[str, nn.Module, Tensor], None]
) -> None:
    """Tell `see` the name, module and first input of each named layer at each of its calls in one forward of `sample`.

    Args:
        sample: a tensor, or a tuple or dict of the model's arguments. Runs without gradient, in the model's present
            mode; torch's random state and the model's buffers, such as running means, are put back.
    """
    modules = dict(model.named_modules())

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            x = arguments[0] if arguments else next(iter(keywords.values()), None)
            if isinstance(x, Tensor):
                see(name, module, x)

        return hook

    handles = [modules[n].register_forward_pre_hook(watch(n), with_kwargs=True) for n in names if n in modules]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if isinstance(sample, Mapping):
                model(**sample)
            else:
                model(*(sample if isinstance(sample, tuple) else (sample,)))
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def training_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
    """Bytes of parameters, gradients, optimizer state and indices as they are now, each counted once."""

    def size(tensors: Iterable[Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())

    parameters = list(model.parameters())
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)] if optimizer else []
    return {
        "parameters": size(parameters),
        "gradients": size(p for p in parameters if p.requires_grad),
        "optimizer": size(state),
        "indices": sum(m.index_bytes() for m in model.modules() if isinstance(m, SparseLayer)),
    }
