"""Trained networks for other tools: dense safetensors, SciPy's sparse matrices, a Hugging Face folder."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from rarefy.files import Checkpoint, atomic_write, read
from rarefy.files.checkpoint import key
from rarefy.files.container import write
from rarefy.nn.low_rank import add_low_rank
from rarefy.pattern import Pattern

if TYPE_CHECKING:
    from scipy.sparse import bsr_matrix, csr_matrix

StrPath = str | os.PathLike[str]


# -- dense ------------------------------------------------------------------------------------------------------------


def to_dense_state_dict(path: StrPath) -> dict[str, Tensor]:
    """The state_dict of the dense model that computes the same: `{name}.weight` for each sparse layer, (out, in) or of
    a convolution (out, in, kh, kw).

    A layer that took the place of Hugging Face's Conv1D has its weight as (in, out), as that stores it. Tied tensors
    are the same object under each name. Needs the memory of the dense model.

    Raises:
        ValueError, OSError: see `rarefy.files.read`.
    """
    return _dense_state_dict(read(path))


def _dense_state_dict(found: Checkpoint) -> dict[str, Tensor]:
    values = {key(name, "values"): name for name in found.patterns}
    thin = {key(name, part) for name in found.low_rank for part in ("a", "b")}
    made: dict[int, Tensor] = {}  # a layer under two names stays one
    state = {}
    for name, tensor in found.tensors.items():
        if name in thin:
            continue
        if name not in values:
            layer, _, part = name.rpartition(".")
            state[key(_whole(found, layer), part)] = tensor
            continue
        layer = values[name]
        if id(tensor) not in made:
            weight = dense_weight(tensor, found.patterns[layer])
            whole = _whole(found, layer)
            if whole != layer:
                a, b = (found.tensors[key(whole, part)] for part in ("a", "b"))
                weight = add_low_rank(weight, a, b, found.low_rank[whole])
            if layer in found.kernels:
                weight = weight.view(weight.shape[0], -1, *found.kernels[layer])
            made[id(tensor)] = weight.T if layer in found.transposed else weight
        state[key(_whole(found, layer), "weight")] = made[id(tensor)]
    return state


def _whole(found: Checkpoint, layer: str) -> str:
    """The layer that a sparse part with a low-rank part beside it belongs to; of any other its own name."""
    parent, _, last = layer.rpartition(".")
    return parent if last == "sparse" and layer in found.patterns and parent in found.low_rank else layer


def dense_weight(values: Tensor, pattern: Pattern) -> Tensor:
    """(out, in) with zeros where no unit is."""
    (b_r, b_c), rows, cols = pattern.block, pattern.num_unit_rows, pattern.num_unit_cols
    units = values.new_zeros(rows, b_r, cols, b_c)
    units[pattern.row_indices(), :, pattern.col_indices.long(), :] = values.view(-1, b_r, b_c)
    return units.view(pattern.shape)


def export_dense(path: StrPath, out: StrPath) -> Path:
    """Write `to_dense_state_dict` as a plain safetensors file, which any reader takes; returns its path.

    Tied tensors are written under each of their names, so that a strict load_state_dict finds them.

    Raises:
        ValueError: see `rarefy.files.read`; or `out` is the file itself.
        OSError: it cannot be written.
    """
    _refuse_same(path, out)
    write(out, to_dense_state_dict(path), {"format": "pt"}, digests=False)
    return Path(out)


def _refuse_same(path: StrPath, out: StrPath) -> None:
    if os.path.realpath(path) == os.path.realpath(out):
        raise ValueError(f"{os.fspath(out)} is the file to be exported: give --out another name")


# -- SciPy ------------------------------------------------------------------------------------------------------------


def to_scipy(path: StrPath) -> dict[str, csr_matrix | bsr_matrix]:
    """The sparse layers' weights (out, in): csr_matrix for unstructured ones, bsr_matrix for blocks.

    float16 and bfloat16, which SciPy does not have, become float32, exactly. Nothing is densified.

    Raises:
        ValueError: SciPy is not installed; or see `rarefy.files.read`.
    """
    return _scipy_matrices(read(path))


def _scipy_matrices(found: Checkpoint) -> dict[str, csr_matrix | bsr_matrix]:
    sparse = _scipy_sparse()
    matrices = {}
    for name, pattern in found.patterns.items():
        data = _as_numpy(found.tensors[key(name, "values")])
        cols, crow = pattern.col_indices.numpy(), pattern.crow_indices.numpy()
        if pattern.block == (1, 1):
            matrices[name] = sparse.csr_matrix((data, cols, crow), shape=pattern.shape)
        else:
            matrices[name] = sparse.bsr_matrix((data, cols, crow), shape=pattern.shape, blocksize=pattern.block)
    return matrices


def export_scipy(path: StrPath, out: StrPath) -> Path:
    """Write a folder: `{layer}.weight.npz` for scipy.sparse.load_npz, `{name}.npy` for numpy.load for all else.

    A layer `X` with a low-rank part has its sparse matrix as `X.sparse.weight.npz` and the rest as `X.a.npy` and
    `X.b.npy`, the scale multiplied into b: the whole is sparse.weight + b @ a.

    No file holds a pickle. Characters that file names cannot have are written as %XX.

    Raises:
        ValueError: SciPy is not installed; or see `rarefy.files.read`.
        OSError: it cannot be written.
    """
    found = read(path)
    matrices, save_npz = _scipy_matrices(found), _scipy_sparse().save_npz
    folder = _new_folder(out)
    for name, matrix in matrices.items():
        file_name = f"{quote(key(name, 'weight'), safe='')}.npz"
        atomic_write(folder / file_name, lambda file, matrix=matrix: save_npz(file, matrix))
    taken = {key(name, "values") for name in matrices}
    scales = {key(name, "b"): scale for name, scale in found.low_rank.items()}
    for name, tensor in found.tensors.items():
        if name not in taken:
            tensor = tensor * scales[name] if name in scales else tensor
            file_name, array = f"{quote(name, safe='')}.npy", _as_numpy(tensor)
            atomic_write(folder / file_name, lambda file, array=array: np.save(file, array, allow_pickle=False))
    return folder


def _scipy_sparse() -> Any:
    try:
        import scipy.sparse
    except ImportError:
        raise ValueError("SciPy is not installed: pip install 'rarefy[export]'") from None
    return scipy.sparse


def _as_numpy(tensor: Tensor) -> np.ndarray:
    """An array of a dtype that NumPy and SciPy both compute with."""
    narrow = tensor.is_floating_point() and tensor.element_size() < 4
    return (tensor.to(torch.float32) if narrow else tensor).numpy()


def _new_folder(out: StrPath) -> Path:
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, and --out must name a folder here")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# -- Hugging Face -----------------------------------------------------------------------------------------------------


def export_hf(path: StrPath, out: StrPath) -> Path:
    """Write a folder for transformers' from_pretrained: dense weights in model.safetensors, settings in config.json.

    A Hugging Face model gets its own names and settings back. The byte-level GPT of `rarefy train text`, without token
    shift, becomes a GPTNeoXForCausalLM, or a GPT2LMHeadModel where positions are learned, that gives the same logits;
    its tokens are bytes, so there is no tokenizer. Nothing in transformers shifts tokens: a GPT that does, as any other
    model, has its dense weights written under its own names, without config.json, and a warning says so. The weights
    are dense: transformers has no layer for ours. Needs no transformers; loading does.

    Raises:
        ValueError: see `rarefy.files.read`.
        OSError: it cannot be written.
    """
    found = read(path)
    state = _dense_state_dict(found)
    described = found.architecture or {}
    config = described.get("config")
    package, _, name = str(described.get("class", "")).rpartition(".")
    gpt = config if (package, name) == ("rarefy", "GPT") else None
    if gpt is not None and not gpt.get("token_shift", False) and gpt.get("attention") in (None, gpt["width"]):
        state = _with_scaled_queries(state, gpt)
        state, config = (_as_gpt2 if gpt.get("positions", "learned") == "learned" else _as_gpt_neox)(state, gpt)
    elif isinstance(config, dict) and "model_type" in config:
        config = {**config, "architectures": [name]} if package == "transformers" else config
        state = _untied(state) if config.get("tie_word_embeddings") else state
    else:
        config = None
        warnings.warn(
            f"{os.fspath(path)} holds {name or 'a model'}, which is no Hugging Face model: model.safetensors has its "
            "own names, and there is no config.json"
            + ("; a GPT that transformers knows is trained with --no-token-shift, without --attention" if gpt else ""),
            stacklevel=2,
        )
    folder = _new_folder(out)
    _refuse_same(path, folder / "model.safetensors")
    write(folder / "model.safetensors", state, {"format": "pt"}, digests=False)
    if config is not None:
        atomic_write(folder / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    return folder


def _untied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor under its first name, as save_pretrained writes tied ones."""
    first: dict[int, str] = {}
    return {name: tensor for name, tensor in state.items() if first.setdefault(id(tensor), name) == name}


_GPT2_NAMES = {
    "embedding": "transformer.wte",
    "position": "transformer.wpe",
    "blocks": "transformer.h",
    "attention_norm": "ln_1",
    "attention": "attn",
    "qkv": "c_attn",
    "out": "c_proj",
    "mlp_norm": "ln_2",
    "mlp": "mlp",
    "up": "c_fc",
    "down": "c_proj",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
"""Part of a name in `rarefy.models.GPT` -> in transformers' GPT2LMHeadModel. Both split qkv into thirds, then heads."""


_BYTES = {"vocab_size": 256, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None}
"""What transformers is told of tokens that are bytes, in either of its models."""

_ACTIVATIONS = {"gelu": "gelu", "squared_relu": "relu2"}
"""As transformers calls them."""

_GPT_NEOX_NAMES = {
    "embedding": "gpt_neox.embed_in",
    "blocks": "gpt_neox.layers",
    "attention_norm": "input_layernorm",
    "attention": "attention",
    "qkv": "query_key_value",
    "out": "dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp": "mlp",
    "up": "dense_h_to_4h",
    "down": "dense_4h_to_h",
    "norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
}
"""For transformers' GPTNeoXForCausalLM, whose rows of query_key_value are split into heads first, then into thirds."""


def _renamed(parts: Sequence[str], names: Mapping[str, str]) -> str:
    return ".".join(names.get(part, part) for part in parts)


def _with_scaled_queries(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Weights of a GPT that scales scores by 1/sqrt(head), as transformers does, in place of 1/d (`base_head`)."""
    width, heads, base_head = config["width"], config["heads"], config.get("base_head")
    if base_head is None:
        return state
    scale = torch.ones(3 * width, dtype=torch.float64)
    scale[:width] = math.sqrt(base_head * heads / width)  # GPTConfig.query_scale; positions turn what is scaled alike
    return {
        name: (scale.view(-1, *[1] * (tensor.ndim - 1)) * tensor).to(tensor.dtype)
        if "qkv" in name.split(".")
        else tensor
        for name, tensor in state.items()
    }


def _as_gpt_neox(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and settings of the GPTNeoXForCausalLM that computes what `rarefy.models.GPT` does."""
    named = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if "qkv" in parts:
            thirds = tensor.unflatten(0, (3, config["heads"], config["width"] // config["heads"]))
            tensor = thirds.transpose(0, 1).reshape(tensor.shape).contiguous()
        named[_renamed(parts, _GPT_NEOX_NAMES)] = tensor
    return named, {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "max_position_embeddings": config["context"],
        "hidden_size": config["width"],
        "num_hidden_layers": config["layers"],
        "num_attention_heads": config["heads"],
        "intermediate_size": config["mlp"] or 4 * config["width"],
        "hidden_act": _ACTIVATIONS[config["activation"]],
        "layer_norm_eps": 1e-5,
        "rotary_pct": 1.0,
        "rotary_emb_base": 10000,
        "use_parallel_residual": False,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        **_BYTES,
    }


def _as_gpt2(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and settings of the GPT2LMHeadModel that computes what `rarefy.models.GPT` does."""
    named = {}
    for name, tensor in state.items():
        parts = name.split(".")
        conv1d = parts[-1] == "weight" and parts[-2] in ("qkv", "out", "up", "down")
        named[_renamed(parts, _GPT2_NAMES)] = tensor.T if conv1d else tensor
    return named, {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_positions": config["context"],
        "n_embd": config["width"],
        "n_layer": config["layers"],
        "n_head": config["heads"],
        "n_inner": config["mlp"] or 4 * config["width"],
        "activation_function": _ACTIVATIONS[config.get("activation", "gelu")],
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        **_BYTES,
    }
