"""y = x W^T + bias, and dx = dy W by the index the other way: one kernel, one tile of tokens and a unit row at a time.

A unit row has N outputs, each unit of it contracts SIDE inputs. Rows of x are tokens, or for row panels features, so
that the gather of single inputs reads whole lines. Values are read where they are, by `perm` for the transposed index.
"""

# Kernels are in Triton's language, which is not quite Python.
# pyright: reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rarefy.ops.triton import device
from rarefy.ops.triton.epilogue import Epilogue, finish, finish_in_slices, halves
from rarefy.ops.triton.order import longest_first
from rarefy.ops.triton.rows import dot, features_of, int32_of, rounded
from rarefy.ops.triton.tuning import Meta, bucket, tuned

_CONFIGS = [
    triton.Config(
        {"TOKENS": tokens, "DEPTH": depth, "GROUP": group, "WAVES": waves}, num_warps=warps, num_stages=stages
    )
    for tokens, depth, warps, stages in [
        (64, 32, 4, 4),
        (64, 64, 4, 4),
        (128, 32, 4, 4),
        (128, 64, 4, 3),
        (128, 64, 8, 4),
        (128, 128, 8, 3),
        (256, 64, 8, 3),
    ]
    for group, waves in [(8, 0), (16, 2)]
]


@tuned(
    _CONFIGS,
    key=["tokens_key", "length_key", "N", "SIDE", "PERMUTED", "EPILOGUE"],
    interpreted={"TOKENS": 32, "DEPTH": 32, "GROUP": 2, "WAVES": 1},
)
@triton.jit(do_not_specialize=["tokens_key", "length_key"])
def product_kernel(
    x,
    values,
    scale,
    bias,
    y,
    second,
    third,
    kept,
    pointers,
    columns,
    perm,
    order,
    num_tokens,
    x_tokens,
    num_rows,
    x_token,
    x_feature,
    y_token,
    kept_features,
    tokens_key,
    length_key,
    N: tl.constexpr,
    SIDE: tl.constexpr,
    VALUE_N: tl.constexpr,
    VALUE_SIDE: tl.constexpr,
    PERMUTED: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    WAVES: tl.constexpr,
):
    token_tiles = tl.cdiv(num_tokens, TOKENS)
    n = tl.arange(0, N)
    for tile in range(tl.program_id(0), token_tiles * num_rows, tl.num_programs(0)):
        # Groups of token tiles meet all rows in turn, so that their part of x stays in the L2 cache.
        first_tile = tile // (GROUP * num_rows) * GROUP
        group = tl.minimum(token_tiles - first_tile, GROUP)
        within = tile % (GROUP * num_rows)
        row = tl.load(order + within // group)
        token = ((first_tile + within % group) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
        in_x = token < x_tokens
        begin = tl.load(pointers + row)
        end = tl.load(pointers + row + 1)
        acc = tl.zeros((TOKENS, N), dtype=tl.float32)
        for at in range(0, (end - begin) * SIDE, DEPTH):
            entry = at + tl.arange(0, DEPTH)
            if DEPTH <= SIDE:  # within one unit
                unit = begin + at // SIDE
                inner = tl.multiple_of(at % SIDE, DEPTH) + tl.arange(0, DEPTH)
                feature = tl.load(columns + unit).to(tl.int64) * SIDE + inner
                if PERMUTED:
                    unit = int32_of(perm, unit, True)
                value = values + unit.to(tl.int64) * (N * SIDE) + inner[:, None] * VALUE_SIDE + n[None, :] * VALUE_N
                w = tl.load(value)
                a = tl.load(x + token[:, None] * x_token + feature[None, :] * x_feature, in_x[:, None], other=0.0)
            else:
                unit = begin + entry // SIDE
                inner = entry % SIDE
                exists = unit < end
                feature = features_of(tl.load(columns + unit, exists, other=0), inner, SIDE)
                if PERMUTED:
                    unit = int32_of(perm, unit, exists)
                place = unit.to(tl.int64) * (N * SIDE) + inner * VALUE_SIDE
                w = tl.load(values + place[:, None] + n[None, :] * VALUE_N, exists[:, None], other=0.0)
                known = in_x[:, None] & exists[None, :]
                a = tl.load(x + token[:, None] * x_token + feature[None, :] * x_feature, known, other=0.0)
            acc = dot(a, w, acc, PRECISION)
        if SCALED:
            acc *= tl.load(scale)
        if BIAS:
            acc += tl.load(bias + row * N + n).to(tl.float32)[None, :]
        is_token = token < num_tokens
        if EPILOGUE == "none":
            out = y + token[:, None] * y_token + (row * N + n)[None, :]
            tl.store(out, rounded(acc, y.dtype.element_ty), is_token[:, None])
        elif N == 16:
            feature = row * N + n
            finish(acc, y, second, third, kept, token, feature, is_token, y_token, kept_features, EPILOGUE, ACTIVATION)
        elif N < 128:
            finish_in_slices(
                *(acc, y, second, third, kept, token, row * N, is_token, y_token, kept_features),
                TOKENS,
                N,
                EPILOGUE,
                ACTIVATION,
            )
        else:
            left, right = halves(acc, TOKENS, N)
            finish_in_slices(
                *(left, y, second, third, kept, token, row * N, is_token, y_token, kept_features),
                TOKENS,
                N // 2,
                EPILOGUE,
                ACTIVATION,
            )
            finish_in_slices(
                *(right, y, second, third, kept, token, row * N + N // 2, is_token, y_token, kept_features),
                TOKENS,
                N // 2,
                EPILOGUE,
                ACTIVATION,
            )


def product(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pointers: Tensor,
    columns: Tensor,
    perm: Tensor | None,
    *,
    tokens: int,
    outputs: int,
    side: int,
    out_dtype: torch.dtype,
    by_feature: bool = False,
    turned: bool = False,
    scale: Tensor | None = None,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """(tokens, rows * outputs): each row's units applied to the inputs they name, and the bias; or what an epilogue
    makes of it.

    Args:
        x: (tokens, inputs), or if `by_feature` (inputs, tokens, and zeros beyond them); of the values' dtype.
        values: (units, b_r, b_c) contiguous, fp32, bf16, fp16, or 8-bit floats.
        pointers: (rows + 1,) where each row's units begin.
        columns: (units,) which `side` inputs each reads.
        perm: where in `values` each unit is; None: in order, and a unit is (outputs, side). Else (side, outputs).
        turned: with `perm`, units are (outputs, side) too.
        scale: () float32, which sums are multiplied by; None: 1.
    """
    rows = pointers.shape[0] - 1
    y = torch.empty(tokens, rows * outputs, dtype=out_dtype, device=x.device)
    if not y.numel():
        return y
    x_token, x_feature = (x.stride(1), x.stride(0)) if by_feature else (x.stride(0), x.stride(1))
    processors, in_order = device.num_processors(x), perm is None or turned

    def grid(meta: Meta) -> tuple[int, ...]:
        tiles = triton.cdiv(tokens, meta["TOKENS"]) * rows
        return (min(tiles, processors * meta["WAVES"]) if meta["WAVES"] else tiles,)

    with device.guard(x):
        product_kernel.launch(
            grid,
            x,
            values,
            scale,
            bias,
            y,
            *((None, None, None) if epilogue is None else (epilogue.second, epilogue.third, epilogue.kept)),
            pointers,
            columns,
            None if perm is None else perm.view(torch.uint16),
            longest_first(pointers),
            tokens,
            x.shape[1] if by_feature else tokens,
            rows,
            x_token,
            x_feature,
            y.stride(0),
            0 if epilogue is None else epilogue.kept.shape[1],
            bucket(tokens),
            bucket(columns.shape[0] // rows),
            N=outputs,
            SIDE=side,
            VALUE_N=side if in_order else 1,
            VALUE_SIDE=1 if in_order else outputs,
            PERMUTED=perm is not None,
            SCALED=scale is not None,
            BIAS=bias is not None,
            EPILOGUE="none" if epilogue is None else epilogue.kind,
            ACTIVATION=0 if epilogue is None else epilogue.activation,
            PRECISION=device.precision(x.dtype),
        )
    return y
