"""The main job on a real model and real text: SmolLM2-135M and GSM8K through the command line, against NumPy."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import prep
from prep.linear import weight_matrix

ROOT = Path(__file__).parents[2]
MODEL = ROOT / ".cache" / "smollm2"
DATA = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"

pytestmark = [
    pytest.mark.stress,
    pytest.mark.skipif(not (MODEL / "model.sha256").exists(), reason="`make demo` fetches the model"),
    pytest.mark.skipif(not DATA.exists(), reason="no GSM8K beside the project"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2") / "s.zarr"
    template = ["--template", r"{question}\n{answer}", "--num-sequences", "64", "--seq-len", "256"]
    command = [sys.executable, "-m", "prep.cli"]
    run = ["covariance", "--model", str(MODEL), "--data", str(DATA), *template, "--store", str(path)]
    subprocess.run([*command, *run], check=True)
    subprocess.run([*command, "decompose", "--store", str(path)], check=True)
    return prep.open_store(path)


@pytest.fixture(scope="module")
def weights():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL)
    return {name: weight_matrix(m).double().numpy() for name, m in model.named_modules() if name.endswith("proj")}


def error_in(left: np.ndarray, C: np.ndarray | None, power: float) -> float:
    """||left M||_F for M = I (C None), C^(1/2) or C, without a root: tr(left C left^T) at power 1/2."""
    if C is None:
        return float(np.linalg.norm(left))
    return float(np.linalg.norm(left @ C) if power == 1 else np.sqrt(np.einsum("ij,ij->", left @ C, left)))


def test_sites_layers_and_tokens(store):
    moments = store.moments
    assert len(moments) == 210
    assert len(moments.sites) == 120
    assert {moments[layer].count for layer in moments} == {16_384}


@pytest.mark.parametrize("method", ["whitened", "corda_ipm", "corda_kpm", "asvd", "pissa", "milora", "antipasto"])
def test_the_tail_is_the_error_in_the_metric(store, weights, method):
    """||(W - U S P) M||_F against the stored tail, every layer, in float64 from the stored C."""
    basis = prep.decompose(store.location, for_=method, quiet=True)
    metric, power = basis.method["metric"], basis.method["power"]
    worst, site, C = 0.0, None, None
    for layer, one in basis.read().items():
        moment, W = store.moments[layer], weights[layer]
        if metric != "identity" and moment.site != site:
            site, C = moment.site, moment.second_moment.double().numpy()
            C = C + basis.method["damping"] * np.trace(C) / len(C) * np.eye(len(C))
            C = np.diag(np.diag(C)) if metric == "diagonal" else C
        left = W - (one.U.double().numpy() * one.S.numpy()) @ one.P.double().numpy()
        gap = abs(error_in(left, C, power) - one.record.tail)
        worst = max(worst, gap / error_in(W, C, power))
    print(f"{method}: largest |error - tail| / ||W M||_F over {len(basis)} layers: {worst:.1e}")
    assert worst < 1e-6
