"""Moments as the files of quantisers: llama.cpp's importance matrix, the Hessians of QuIP# and VPTQ."""

import sys
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import tiny
import torch

import prep
from prep.adapters.moments import sums_by_tensor
from prep.store import open_store


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Stores of a tiny Llama, with full moments and with others, and of a mixture of experts."""
    path = tmp_path_factory.mktemp("moments")
    given = tiny.sources(path)
    made = SimpleNamespace(path=path, llama=path / "llama.zarr", output=path / "output.zarr", moe=path / "moe.zarr")
    prep.covariance(given.model, given.data, store=made.llama, **tiny.RUN)
    prep.covariance(given.model, given.data, store=made.output, moment="output", layers="0", **tiny.RUN)
    moe = tiny.save(tiny.model("Qwen3-MoE", num_experts=24), path / "moe")
    prep.covariance(moe, given.data, store=made.moe, **tiny.RUN)
    return made


def read(path):
    """The fields and tensors of a GGUF file by the gguf package; tensors as (m, d)."""
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t.data for t in reader.tensors}


def loaded(tensors):
    """What llama-quantize makes of a matrix: the sums divided by the counts of each expert, 1 where there are none."""
    out = {}
    for name in {name.rpartition(".")[0] for name in tensors}:
        sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
        assert sums.dtype == counts.dtype == np.float32
        assert counts.shape == (len(sums), 1)
        out[name] = np.where(counts > 0, sums / np.maximum(counts, 1), 1)
    return out


LLAMA = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
LLAMA |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
LLAMA |= {"ffn_down": "mlp.down_proj"}


@pytest.mark.parametrize("kind", ["llama", "output"])
def test_an_importance_matrix_is_the_diagonal(home, tmp_path, kind):
    store = getattr(home, kind)
    fields, tensors = read(prep.export(store, "imatrix", tmp_path / "imatrix.gguf"))
    assert fields["general.type"] == "imatrix"
    assert [path.rpartition("/")[2] for path in fields["imatrix.datasets"]] == ["text.jsonl"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (8, 16)
    assert not any(name.startswith("general.architecture") for name in fields)
    moments, values = open_store(store).moments, loaded(tensors)
    blocks = 2 if kind == "llama" else 1
    assert values.keys() == {f"blk.{i}.{name}.weight" for i in range(blocks) for name in LLAMA}
    for name, value in values.items():
        _, block, short, _ = name.split(".")
        moment = moments[f"model.layers.{block}.{LLAMA[short]}"]
        assert tiny.relative(value[0], moment.diagonal.numpy()) < 1e-6
        assert tensors[f"{name}.counts"] == moment.count == 8 * 16


def test_an_importance_matrix_of_experts(home, tmp_path):
    """A row for each expert; one that no token was routed to has the count 0."""
    _, tensors = read(prep.export(home.moe, "imatrix", tmp_path / "imatrix.gguf"))
    moments = open_store(home.moe).moments
    idle = [name for name in moments.skipped if ".experts." in name and name.endswith("down_proj")]
    assert idle
    for block in (0, 1):
        for part, key in (("gate", "gate_up_proj"), ("up", "gate_up_proj"), ("down", "down_proj")):
            name = f"blk.{block}.ffn_{part}_exps.weight"
            sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
            assert len(sums) == 24
            for e in range(24):
                layer = f"model.layers.{block}.mlp.experts.{e}.{key}"
                if layer not in moments:
                    assert counts[e] == 0 and not sums[e].any()
                    continue
                assert counts[e] == moments[layer].count
                assert tiny.relative(sums[e] / counts[e], moments[layer].diagonal.numpy()) < 1e-6
    assert len(sums_by_tensor(open_store(home.moe))) == 2 * (4 + 3)


def flat_to_sym(V, N):
    """QuIP#'s reader of a lower triangle, as its documentation gives it: A[i, j] = A[j, i] = V[k]."""
    A = np.zeros((N, N))
    rows, columns = np.tril_indices(N)
    A[rows, columns] = V
    A[columns, rows] = V
    return A


def test_hessians_are_read_back_as_quip_sharp_does(home, tmp_path):
    """H + mu mu^T, from the files of its names, is the second moment; nothing but tensors and numbers is in them."""
    path = prep.export(home.llama, "hessian", tmp_path / "hessians")
    keys = {"qkv": "self_attn.v_proj", "o": "self_attn.o_proj", "up": "mlp.gate_proj", "down": "mlp.down_proj"}
    assert {file.name for file in path.iterdir()} == {f"{block}_{key}.pt" for block in (0, 1) for key in keys}
    moments = open_store(home.llama).moments
    for file in path.iterdir():
        block, key = file.stem.split("_")
        moment = moments[f"model.layers.{block}.{keys[key]}"]
        data = torch.load(file, weights_only=True)
        assert data.keys() == {"flatH", "mu", "n", "ct"}
        assert data["flatH"].dtype == data["mu"].dtype == torch.float32
        assert (data["n"], data["ct"]) == (moment.shape[1], moment.count)
        mu = data["mu"].double().numpy()
        H = flat_to_sym(data["flatH"].double().numpy(), data["n"]) + np.outer(mu, mu)
        assert tiny.relative(H, moment.second_moment.numpy()) < 1e-6
        assert tiny.relative(mu, moment.mean.numpy()) < 1e-6


def test_hessians_of_experts_and_a_second_export(home, tmp_path):
    path = prep.export(home.moe, "hessian", tmp_path / "hessians")
    names = {file.name for file in path.iterdir()}
    assert {"0_qkv.pt", "1_o.pt"} <= names
    assert sum(".experts." in f".{name}" for name in names) == sum(
        ".experts." in x for x in open_store(home.moe).moments
    )
    with pytest.raises(prep.PrepError, match="is there already"):
        prep.export(home.moe, "hessian", path)
    assert prep.export(home.llama, "hessian", path, overwrite=True) == path


def test_what_cannot_be_exported(home, tmp_path, monkeypatch):
    with pytest.raises(prep.StoreError, match="second moment"):
        prep.export(home.output, "hessian", tmp_path / "h")
    store = open_store(home.llama)
    monkeypatch.setitem(store.attrs["model"], "class", "TinyForCausalLM")
    with pytest.raises(prep.PrepError, match="names for the tensors of TinyForCausalLM are not known"):
        prep.export(store, "imatrix", tmp_path / "i.gguf")
    monkeypatch.setitem(store.attrs["model"], "class", "MambaForCausalLM")
    with pytest.raises(prep.PrepError, match=r"llama\.cpp has no name for model\.layers\.0"):
        prep.export(store, "imatrix", tmp_path / "i.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(prep.PrepError, match=r'pip install "prep-bases\[gguf\]"'):
        prep.export(home.llama, "imatrix", tmp_path / "i.gguf")
    assert not list(tmp_path.iterdir())
