"""Exports compute what the sparse model does, in other tools."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import rarefy
from rarefy import export
from rarefy.cli.main import main
from rarefy.models import GPT, GPTConfig

scipy_sparse = pytest.importorskip("scipy.sparse")


class Net(nn.Module):
    """Unstructured and block layers, and a tied pair."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 40)
        self.down = nn.Linear(40, 24, bias=False)
        self.head = nn.Linear(24, 24)
        self.tied = nn.Linear(24, 24)
        self.tied.weight = self.head.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.head(self.down(torch.relu(self.up(x)))))


@pytest.fixture(params=[1, 4, (2, 8)], ids=str)
def net(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A sparse network and its file."""
    model: Any = Net()
    rarefy.sparsify(model, rarefy.Plan(density=0.3, block=request.param, keep_dense=("head",)))
    rarefy.save(model, tmp_path / "net.safetensors")
    return model, tmp_path / "net.safetensors"


# -- dense ------------------------------------------------------------------------------------------------------------


def test_dense_state_dict_fits_the_dense_model(net: tuple[Any, Path]) -> None:
    model, path = net
    state = export.to_dense_state_dict(path)
    dense = Net()
    dense.load_state_dict(state)
    assert torch.equal(dense.up.weight, model.up.dense_weight())
    assert state["tied.weight"] is state["head.weight"]
    x = torch.randn(5, 24)
    torch.testing.assert_close(dense(x), model(x))


def test_dense_file_is_plain_and_whole(net: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = net
    assert export.export_dense(path, tmp_path / "dense.safetensors") == tmp_path / "dense.safetensors"
    dense = Net()
    dense.load_state_dict(load_file(tmp_path / "dense.safetensors"))
    assert torch.equal(dense.down.weight, model.down.dense_weight())
    with safe_open(tmp_path / "dense.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    again = Net()
    rarefy.load_into(tmp_path / "dense.safetensors", again)  # and ours to read, as any plain file
    assert torch.equal(again.up.weight, dense.up.weight)


def test_a_dense_export_never_replaces_its_source(net: tuple[Any, Path], tmp_path: Path) -> None:
    _, path = net
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"net\.safetensors is the file to be exported"):
        export.export_dense(path, tmp_path / "." / "net.safetensors")
    assert path.read_bytes() == before


def test_a_file_without_sparse_layers_exports_too(tmp_path: Path) -> None:
    linear = nn.Linear(3, 2)
    rarefy.save(nn.Sequential(linear), tmp_path / "a.safetensors")
    assert torch.equal(export.to_dense_state_dict(tmp_path / "a.safetensors")["0.weight"], linear.weight)
    assert export.to_scipy(tmp_path / "a.safetensors") == {}


# -- SciPy ------------------------------------------------------------------------------------------------------------


def test_scipy_matrices_multiply_alike(net: tuple[Any, Path]) -> None:
    model, path = net
    matrices = export.to_scipy(path)
    assert set(matrices) == {"up", "down"}
    for name, matrix in matrices.items():
        layer = getattr(model, name)
        assert (matrix.toarray() == layer.dense_weight().numpy()).all() and matrix.dtype == np.float32
        assert matrix.format == ("csr" if layer.block == (1, 1) else "bsr")
        assert matrix.nnz == layer.values.numel() and matrix.has_canonical_format


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_scipy_of_dtypes_that_it_lacks(dtype: torch.dtype, tmp_path: Path) -> None:
    layer = rarefy.SparseLinear(16, 8, density=0.5, dtype=dtype)
    rarefy.save(nn.Sequential(layer), tmp_path / "a.safetensors")
    matrix = export.to_scipy(tmp_path / "a.safetensors")["0"]
    assert (matrix.toarray() == layer.dense_weight().double().numpy()).all()


def test_scipy_folder_holds_no_pickle(net: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = net
    folder = export.export_scipy(path, tmp_path / "out")
    names = {"up.weight.npz", "down.weight.npz", "up.bias.npy", "head.weight.npy", "head.bias.npy"}
    assert {entry.name for entry in folder.iterdir()} == names | {"tied.weight.npy", "tied.bias.npy"}
    matrix = scipy_sparse.load_npz(folder / "up.weight.npz")
    assert (matrix.toarray() == model.up.dense_weight().numpy()).all()
    assert (np.load(folder / "up.bias.npy", allow_pickle=False) == model.up.bias.detach().numpy()).all()


def test_scipy_export_into_a_file_is_refused(net: tuple[Any, Path]) -> None:
    with pytest.raises(ValueError, match="must name a folder"):
        export.export_scipy(net[1], net[1])


def test_odd_layer_names_become_file_names(tmp_path: Path) -> None:
    rarefy.save(
        nn.ModuleDict({"a/b c": rarefy.SparseLinear(8, 8, density=0.5, bias=False)}), tmp_path / "a.safetensors"
    )
    folder = export.export_scipy(tmp_path / "a.safetensors", tmp_path / "out")
    assert [entry.name for entry in folder.iterdir()] == ["a%2Fb%20c.weight.npz"]


def test_without_scipy_one_line_says_what_to_install(
    net: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imports = builtins.__import__

    def without_scipy(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "scipy":
            raise ImportError(name)
        return imports(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    assert main(["export", str(net[1]), "--to", "scipy", "--out", str(net[1].parent / "out")]) == 2
    assert capsys.readouterr().err == "rarefy: SciPy is not installed: pip install 'rarefy[export]'\n"
    assert not (net[1].parent / "out").exists()


# -- Hugging Face -----------------------------------------------------------------------------------------------------


def hf_model(kind: str, tied: bool) -> Any:
    transformers = pytest.importorskip("transformers")
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=64,
            n_positions=32,
            n_embd=32,
            n_layer=2,
            n_head=2,
            tie_word_embeddings=tied,
            bos_token_id=0,
            eos_token_id=0,
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_hf_models_come_back_by_from_pretrained(kind: str, tied: bool, tmp_path: Path) -> None:
    model = hf_model(kind, tied)
    rewirer = rarefy.sparsify(model, rarefy.Plan(density=0.3, keep_dense=("lm_head",)))
    assert len(rewirer.layers) >= 8  # GPT-2's Conv1D among them, which stores weights transposed, square ones too
    rarefy.save(model, tmp_path / "a.safetensors")
    tokens = torch.randint(64, (2, 16))

    folder = export.export_hf(tmp_path / "a.safetensors", tmp_path / "hf")

    transformers = pytest.importorskip("transformers")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    fresh = hf_model(kind, tied)
    fresh.load_state_dict(export.to_dense_state_dict(tmp_path / "a.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(fresh(tokens).logits, model(tokens).logits)


def test_hf_files_tell_nothing_of_this_machine(tmp_path: Path) -> None:
    model = hf_model("gpt2", True)
    model.save_pretrained(tmp_path / "first")
    model = type(model).from_pretrained(tmp_path / "first")
    rarefy.save(model, tmp_path / "a.safetensors")
    assert str(tmp_path).encode() not in (tmp_path / "a.safetensors").read_bytes()


def gpt(block: Any, **shape: Any) -> GPT:
    model = GPT(GPTConfig(width=32, layers=2, heads=4, context=24, **shape), torch.Generator().manual_seed(1))
    for p in model.parameters():  # biases and norms too, which start at 0 and 1
        nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    rarefy.sparsify(model, rarefy.Plan(density=0.3, block=block, keep_dense=("head",)))
    return model.eval()


@pytest.mark.parametrize("shape", [{}, {"mlp": 48, "activation": "gelu"}, {"base_width": 16, "base_head": 2}], ids=str)
@pytest.mark.parametrize("block", [1, 4], ids=str)
@pytest.mark.parametrize("positions, kind", [("learned", "GPT2LMHeadModel"), ("rotary", "GPTNeoXForCausalLM")])
def test_our_gpt_becomes_one_of_transformers_with_the_same_logits(
    positions: str, kind: str, block: int, shape: Any, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    model = gpt(block, positions=positions, token_shift=False, **shape)
    rarefy.save(model, tmp_path / "a.safetensors")

    folder = export.export_hf(tmp_path / "a.safetensors", tmp_path / "hf")

    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(loaded).__name__ == kind
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens)
        torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize("shape", [{}, {"token_shift": False, "attention": 16}], ids=str)
def test_a_gpt_unlike_theirs_is_written_under_its_own_names_and_what_to_do_is_said(shape: Any, tmp_path: Path) -> None:
    rarefy.save(gpt(1, **shape), tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match=r"no Hugging Face model.*with --no-token-shift, without --attention"):
        folder = export.export_hf(tmp_path / "a.safetensors", tmp_path / "hf")
    assert [entry.name for entry in folder.iterdir()] == ["model.safetensors"]


def test_a_model_of_no_known_kind_is_written_and_said(net: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = net
    with pytest.warns(UserWarning, match=r"no Hugging Face model.*no config\.json"):
        folder = export.export_hf(path, tmp_path / "hf")
    assert [entry.name for entry in folder.iterdir()] == ["model.safetensors"]
    assert torch.equal(load_file(folder / "model.safetensors")["up.weight"], model.up.dense_weight())


def test_hf_export_into_the_sources_folder_keeps_the_source(tmp_path: Path) -> None:
    rarefy.save(gpt(1), tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is the file to be exported"):
        export.export_hf(tmp_path / "model.safetensors", tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


# -- command line -----------------------------------------------------------------------------------------------------


def run_folder(folder: Path, *, ended: bool) -> GPT:
    """As a text run leaves it: the final model, or the checkpoints that latest.json names."""
    folder.mkdir()
    model = gpt(1, token_shift=False)
    if ended:
        rarefy.save(model, folder / "model.safetensors")
    else:
        clock = dict.fromkeys(("data_s", "forward_s", "backward_s", "optimizer_s", "rewire_s"), 0.0)
        rarefy.save(model, folder / "checkpoint-sparse-7.safetensors")
        entry = {"file": "checkpoint-sparse-7.safetensors", "step": 7, "clock": clock}
        (folder / "latest.json").write_text(json.dumps({"twins": {"sparse": entry}}))
    return model


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "running"])
@pytest.mark.parametrize("to, name", [("dense", "dense.safetensors"), ("scipy", "scipy"), ("hf", "hf")])
def test_cli_exports_a_run(ended: bool, to: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = run_folder(tmp_path / "run", ended=ended)
    assert main(["export", "--to", to, str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / name}\n"
    weight = model.get_submodule("blocks.0.mlp.up").dense_weight()  # type: ignore[operator]
    found = {
        "dense": lambda: load_file(tmp_path / "run" / name)["blocks.0.mlp.up.weight"],
        "scipy": lambda: torch.tensor(
            scipy_sparse.load_npz(tmp_path / "run/scipy/blocks.0.mlp.up.weight.npz").toarray()
        ),
        "hf": lambda: load_file(tmp_path / "run/hf/model.safetensors")["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"],
    }[to]()
    assert torch.equal(found, weight)


def test_cli_exports_a_file_beside_it_or_where_told(net: tuple[Any, Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = net[1]
    assert main(["export", str(path), "--to", "dense"]) == 0
    assert main(["export", str(path), "--to", "dense", "--out", str(path.parent / "x.safetensors")]) == 0
    assert (path.parent / "net-dense.safetensors").read_bytes() == (path.parent / "x.safetensors").read_bytes()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: None, "there is no such file or folder"),
        (lambda path: path.mkdir(), "holds no network"),
        (lambda path: path.write_bytes(b"nothing of the kind"), "not a safetensors file"),
        (lambda path: torch.save({"a": torch.ones(1)}, path), "never loads pickles"),
    ],
    ids=["missing", "empty folder", "text", "pickle"],
)
def test_cli_says_in_one_line_what_is_wrong(
    make: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "source")
    assert main(["export", str(tmp_path / "source"), "--to", "dense"]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("rarefy: ") and words in error and str(tmp_path / "source") in error and error.count("\n") == 1
    )


def test_cli_help_and_unknown_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    assert "--to" in capsys.readouterr().out
    assert main(["export", "x", "--to", "onnx"]) == 2
