"""What every sparse layer is: values at the units of a pattern of its weight matrix, and the index that finds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from rarefy.init import DrawnInit, bias_bound, drawn_pattern, grouped_pattern, linear_values, values_shape
from rarefy.ops import Index, index_dtype, spread, two_four
from rarefy.ops.reference import dense
from rarefy.ops.sink import new_sink
from rarefy.ops.triton import order
from rarefy.pattern import Pattern, unit_grid

INDEX_BUFFERS = ("crow_indices", "col_indices", "t_crow", "t_rows", "t_perm")
"""In the order of `rarefy.ops.Index`. The first two are the pattern and are saved; the others follow from them."""


class SparseLayer(nn.Module):
    """Values, pattern, state and checkpoints of a layer whose weight, seen as a matrix, is (out_features, in_features).

    What it computes from them is its subclass's.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    crow_indices: Tensor
    col_indices: Tensor
    t_crow: Tensor
    t_rows: Tensor
    t_perm: Tensor
    sink: Tensor
    compute: Literal["sparse", "dense"] = "sparse"
    """How products are computed; see `set_compute`."""
    transposed: bool = False
    """Whether the dense layer it took the place of stores its weight as (in, out), which an export must know."""
    groups: int = 1
    """Equal groups of rows that look at inputs of their own: a column is then one of each group's."""

    def _allocate(
        self,
        shape: tuple[int, int],
        block: tuple[int, int],
        num_units: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Modules' own set-up, and tensors of the right sizes, with nothing drawn yet."""
        super().__init__()
        self.out_features, self.in_features = shape
        self.block = block
        size = (num_units,) if block == (1, 1) else (num_units, *block)
        self.values = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype)) if bias else None
        self._allocate_indices(device)
        self.register_buffer("sink", new_sink(), persistent=False)
        self.has_pattern = False
        self.pattern_seed: int | None = None
        self.pattern_init: DrawnInit = "random"
        self.pattern_groups = 1

    def _allocate_indices(self, device: torch.device | str | None) -> None:
        """Buffers of the right sizes for a pattern to come."""
        rows, cols = unit_grid((self.out_features, self.in_features), self.block)
        narrow = index_dtype(rows, cols)
        by_column = self.num_units if self.compute == "sparse" else 0
        lengths = {
            "crow_indices": rows + 1,
            "col_indices": self.num_units,
            "t_crow": cols + 1,
            "t_rows": by_column,
            "t_perm": by_column,
        }
        for name, length in lengths.items():
            kind = narrow if name in ("col_indices", "t_rows") else torch.int32
            empty = torch.empty(length, device=device, dtype=kind)
            self.register_buffer(name, empty, persistent=name in INDEX_BUFFERS[:2])

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh values and bias, and a pattern too if the layer has none yet (made on the meta device).

        Draws on the CPU, from `generator`, the layer's own seed if `sparsify` gave one, or torch's global generator.
        """
        if generator is None and self.pattern_seed is not None:
            generator = torch.Generator().manual_seed(self.pattern_seed)
        if not self.has_pattern:

            def draw(shape: tuple[int, int], units: int, group: int) -> Pattern:
                return drawn_pattern(self.pattern_init, shape, units, self.block, generator=generator)

            shape = (self.out_features, self.in_features)
            self.set_pattern(grouped_pattern(draw, shape, self.num_units, self.block, self.pattern_groups))
        with torch.no_grad():
            self.values.copy_(linear_values(self.pattern.to("cpu"), generator=generator))
            if self.bias is not None:
                bound = bias_bound(self.in_features)
                self.bias.copy_((torch.rand(self.out_features, generator=generator) * 2 - 1) * bound)

    # -- pattern ------------------------------------------------------------------------------------------------------

    @property
    def pattern(self) -> Pattern:
        """Where the units are, as a value: a copy that later rewires do not change."""
        self._need_pattern()
        crow, cols = self.crow_indices.clone(), self.col_indices.to(torch.int32, copy=True)
        return Pattern.trusted(crow, cols, (self.out_features, self.in_features), self.block)

    def _need_pattern(self) -> None:
        if not self.has_pattern or self.values.device.type == "meta":
            raise ValueError(
                f"this {type(self).__name__} was made on the meta device and has no pattern yet: "
                "call model.to_empty(device=...), then reset_parameters() on it, or load a checkpoint"
            )

    def set_pattern(self, pattern: Pattern) -> None:
        """Replace the pattern by one with as many units as there are values. These stay as they are, in pattern order.

        In place, as long as the number of units is what it was; else (the engine resized the values, rule 2.3) the
        index tensors get new memory.

        Raises:
            ValueError: another shape, block or number of units.
        """
        mine = ((self.out_features, self.in_features), self.block, self.num_units)
        if (pattern.shape, pattern.block, pattern.num_units) != mine:
            raise ValueError(
                f"a pattern of shape {mine[0]}, block {mine[1]} and {mine[2]} units is needed, "
                f"got shape {pattern.shape}, block {pattern.block} and {pattern.num_units} units"
            )
        if self.col_indices.shape[0] != self.num_units:
            self._allocate_indices(self.values.device)
        index = Index.of(pattern, by_column=self.compute == "sparse")
        for name, array in zip(INDEX_BUFFERS, index, strict=False):
            getattr(self, name).copy_(array)
        order.refresh(self.crow_indices, self.t_crow)
        two_four.refresh(self.index)
        spread.refresh(self.index, self.groups)
        self.has_pattern = True

    def make_room(self, num_units: int) -> None:
        """Storage for so many units, for a state that is loaded next; the same Parameter object. Where the number is
        another one, values become 0 at the first units of the matrix.

        Raises:
            ValueError: more units than the matrix has.
        """
        if num_units == self.num_units:
            return
        shape = (self.out_features, self.in_features)
        pattern = Pattern.from_sorted_units(torch.arange(num_units, device=self.values.device), shape, self.block)
        self.values.grad = None
        resize(self.values, self.values.new_zeros(values_shape(pattern)))
        self.set_pattern(pattern)

    def set_compute(self, how: Literal["sparse", "dense"]) -> None:
        """Compute products over the units only, or, at densities where that is faster, as dense torch does.

        "dense" expands the values to an (out_features, in_features) weight for each product, and forgets it after;
        parameter, gradient, optimizer state and checkpoints stay those of the units. The index by columns is dropped
        meanwhile. A compiled model compiles once more. Nothing about results changes but rounding.

        Raises:
            ValueError: neither of the two.
        """
        if how not in ("sparse", "dense"):
            raise ValueError(f'compute must be "sparse" or "dense", got {how!r}')
        if how == self.compute:
            return
        pattern = self.pattern if self.has_pattern and self.values.device.type != "meta" else None
        self.compute = how
        self._allocate_indices(self.values.device)
        if pattern is not None:
            self.set_pattern(pattern)

    @property
    def index(self) -> Index:
        """The index tensors, as the ops take them."""
        return Index(self.crow_indices, self.col_indices, self.t_crow, self.t_rows, self.t_perm, list(self.block))

    @property
    def num_units(self) -> int:
        """K, the active units."""
        return self.values.shape[0]

    @property
    def density(self) -> float:
        """Share of the matrix's entries that exist."""
        size = self.out_features * self.in_features
        return self.values.numel() / size if size else 0.0

    def index_bytes(self) -> int:
        """Bytes of all index tensors of the layer."""
        own = sum(getattr(self, name).numel() * getattr(self, name).element_size() for name in INDEX_BUFFERS)
        return own if self.compute == "dense" else own + spread.num_bytes(self.index, self.groups)

    # -- use ----------------------------------------------------------------------------------------------------------

    @staticmethod
    def cast(x: Tensor) -> Tensor:
        """x in the dtype that autocast asks for."""
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # of meta tensors autocast knows nothing
            return x
        known = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        return x.to(torch.get_autocast_dtype(x.device.type)) if known else x

    def dense_weight(self) -> Tensor:
        """(out_features, in_features) with zeros where no unit is; for export and tests."""
        self._need_pattern()
        return dense(self.values.detach(), self.index)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__} has no dense weight: use .values (what trains), .pattern (where it is) or "
                ".to_dense()"
            )
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As every module's, but the sink stays where it is: each backward pass reads it on the CPU, and would wait for
        a GPU that holds it.
        """
        sink = self._buffers["sink"]
        super()._apply(fn, recurse)
        self._buffers["sink"] = sink
        return self

    # -- copies and checkpoints
    # ------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Narrow indices travel as int16 of the same bits: pickle cannot read torch's uint16 tensors back."""
        return {**self.__dict__, "_buffers": self._buffers | _viewed(self._buffers, torch.uint16, torch.int16)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy must not answer for the layer that it was copied from; a shallow one shares the dict of buffers.
        self._buffers = self._buffers | _viewed(self._buffers, torch.int16, torch.uint16)
        self._buffers["sink"] = new_sink()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Checks the pattern whole before anything of the layer is touched, then rebuilds what follows from it (rule
        9.3).
        """
        crow, cols, values = (state_dict.get(prefix + name) for name in ("crow_indices", "col_indices", "values"))
        if crow is None and cols is None and values is None:
            hint = " (the checkpoint has a dense weight there)" if prefix + "weight" in state_dict else ""
            missing_keys.extend(prefix + name + hint for name in ("values", "crow_indices", "col_indices"))
            return
        try:
            if crow is None or cols is None or values is None:
                raise ValueError("values come with crow_indices and col_indices, and one of the three is missing")
            if tuple(values.shape) != tuple(self.values.shape):
                raise ValueError(
                    f"{tuple(values.shape)} values do not fit this layer's {tuple(self.values.shape)}: "
                    "it was made with another density or block (or its density moved: then load the rewirer's state "
                    "first)"
                )
            assigns = local_metadata.get("assign_to_params_buffers", False)
            if crow.device.type != "meta" and (assigns or self.values.device.type != "meta"):
                pattern = Pattern(crow, cols, (self.out_features, self.in_features), self.block)
                if assigns:
                    self._allocate_indices(values.device)
                    self.has_pattern = False
                self.set_pattern(pattern)
                # The checked indices, in this layer's own dtype and memory, even where values are assigned.
                state_dict = {key: item for key, item in state_dict.items() if key.startswith(prefix)}
                state_dict |= {prefix + name: getattr(self, name) for name in INDEX_BUFFERS[:2]}
        except ValueError as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
            return
        arguments = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _viewed(buffers: Mapping[str, Tensor | None], source: torch.dtype, target: torch.dtype) -> dict[str, Tensor]:
    """Those of one dtype, seen as another of the same width."""
    return {name: b.view(target) for name, b in buffers.items() if b is not None and b.dtype == source}


def resize(tensor: Tensor, content: Tensor) -> None:
    """Give the same tensor object other memory, of another size."""
    if tensor.requires_grad:
        # The last loss may still hold the node that accumulates gradients of the old size; torch makes a new one only
        # where the dtype changes.
        tensor.data = content.new_empty(0, dtype=torch.float64 if content.dtype != torch.float64 else torch.float32)
    tensor.data = content.detach()
    torch.autograd.graph.increment_version(tensor)  # a forward pass from before must not go backward now (7.5)


def gather_units(weight: Tensor, pattern: Pattern) -> Tensor:
    """Values of a dense (O, I) weight at the units of a pattern, in the shape of `SparseLinear.values`."""
    b_r, b_c = pattern.block
    units = weight.reshape(pattern.num_unit_rows, b_r, pattern.num_unit_cols, b_c)
    rows, cols = pattern.row_indices().to(weight.device), pattern.col_indices.long().to(weight.device)
    return units[rows, :, cols, :].reshape(values_shape(pattern))
