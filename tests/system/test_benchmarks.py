"""Every benchmark runs to its end on a tiny model, which includes its own comparison of results."""

import json
import runpy
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import prep

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a benchmark in this process as `python benchmarks/NAME.py` does, and give what it prints."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    threads = torch.get_num_threads()

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    yield call
    torch.set_num_threads(threads)
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Model, data and a store with the bases that the benchmarks read."""
    given = tiny.sources(tmp_path_factory.mktemp("benchmarks"), tiny.llama(80), sentences=120)
    store = given.path / "s.zarr"
    prep.covariance(given.model, given.data, store=store, num_sequences=40, seq_len=16, moment="full", quiet=True)
    for metric in ("full", "identity"):
        prep.decompose(store, metric=metric, rank=8, quiet=True)
    return {"model": given.model, "data": given.data, "store": store}


def test_scaling(run, tmp_path):
    report, plot = tmp_path / "scaling.json", tmp_path / "scaling.svg"
    cheap = ["--shrink", 16, "--seconds", 0, "--threads", 1]
    printed = run("scaling", *cheap, "--wide", "--json", report, "--plot", plot)
    sections = json.loads(report.read_text())["figures"]
    stages = {section: {figure["stage"] for figure in figures} for section, figures in sections.items()}
    passes = {"forward", "pass full", "pass auto"}
    decompositions = {"decompose exact", "decompose auto"}
    assert stages == {
        "tokens": passes,
        "width": passes | decompositions,
        "depth": passes | decompositions,
        "rank": decompositions | {"decompose randomized", "attach"},
        "wide": {"full exact", "full auto", "output exact", "output auto", "published"},
    }
    for section, figures in sections.items():
        assert f"\n{max(figure['x'] for figure in figures):12} " in printed, section
        assert min(figure["seconds"] for figure in figures) > 0
    first, second, third = (figure for figure in sections["wide"] if figure["stage"] == "published")
    assert [first["extrapolated"], second["extrapolated"], third["extrapolated"]] == [False, False, True]
    assert third["seconds"] == pytest.approx(second["seconds"] ** 2 / first["seconds"])  # every width is doubled
    drawing = xml.etree.ElementTree.parse(plot).getroot()
    circles = [element for element in drawing.iter() if element.tag.endswith("circle")]
    assert len(circles) == sum(map(len, sections.values()))
    assert sum(circle.get("fill") == "white" for circle in circles) == 1
    assert plot.stat().st_size < 30_000


def test_scaling_refuses_an_unknown_section(run, capsys):
    with pytest.raises(SystemExit):
        run("scaling", "--only", "tokens,height")
    assert "--only height: the sections are tokens, width, depth, rank, wide" in capsys.readouterr().err


def test_the_exponent_and_the_rounds(run):
    from figures import Figure, measure, slope

    xs = np.array([3, 10, 40])
    assert slope([Figure(int(x), "a", 0.2 * x**1.7) for x in xs]) == pytest.approx(1.7)
    calls = []
    assert [figure.samples for figure in measure(1, {"a": lambda: calls.append(1)}, rounds=5, seconds=0)] == [1]
    assert calls == [1]


def test_preprocess(run, made):
    sizes = ["--num-sequences", 16, "--seq-len", 16, "--batch-size", 4, "--rank", 4]
    printed = run("preprocess", "--model", made["model"], "--data", made["data"], *sizes, "--rounds", 1, "--no-memory")
    assert all(f"\n{stage} " in printed for stage in ("prep full", "peft covariance", "decompose auto randomized"))


def test_attach(run, made):
    printed = run("attach", "--model", made["model"], "--store", made["store"], "--rank", 8, "--rounds", 1)
    assert "14 layers, rank 8" in printed
    assert all(f"\n{stage} " in printed for stage in ("attach", "attach, verify=False", "safetensors"))


def test_adapters(run):
    printed = run("adapters", "--d-in", 24, "--d-out", 16, "--rank", 4, "--tokens", 8, "--rounds", 1)
    assert all(f"\n{core} " in printed for core in ("base", "peft lora", "gain", "rotation", "dense"))


def test_peft_startup(run, made):
    printed = run("peft_startup", "--model", made["model"], "--store", made["store"], "--rank", 4)
    assert "PiSSA, rank 4, 14 layers" in printed
    assert "there PEFT is" in printed


def test_gpu(run, tmp_path):
    report = tmp_path / "gpu.json"
    sizes = ["--shrink", 128, "--rounds", 1, "--blocks", 1, "--seq-len", 16]
    printed = run("gpu", "--device", "cpu", *sizes, "--json", report)
    figures = json.loads(report.read_text())
    assert figures.keys() == {"device", "pass", "products", "error", "state", "attach", "step"}
    assert set(figures["pass"]["8 x 16"]) == {"forward", "prep full", "prep auto", "published", "peft corda"}
    assert all(value["scaled"] < 5e-6 for value in figures["error"].values())
    assert "\n  dplr " in printed


@pytest.fixture(scope="module")
def questions(made, tmp_path_factory):
    """Files of questions and answers in the tiny model's words: to calibrate and train on, and held out."""
    directory, texts = tmp_path_factory.mktemp("questions"), list(dict.fromkeys(tiny.texts(160)))
    rows = [{"question": text, "answer": f"{text.split()[0]} {text.split()[-1]}"} for text in texts]
    files = directory / "train.jsonl", directory / "test.jsonl"
    for file, part in zip(files, (rows[:-12], rows[-12:]), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
    return files


SMALL = ["--calibration-rows", 60, "--calibration-sequences", 4, "--calibration-length", 16, "--evaluation-rows", 6]
SMALL += ["--other-sequences", 2, "--steps", 2, "--batch-size", 2, "--max-length", 48, "--device", "cpu"]


def test_sweep(run, made, questions, tmp_path):
    train, held = questions
    common = ["--model", made["model"], "--data", train, "--evaluation", held, "--work", tmp_path, *SMALL]
    small = ["--methods", "lora,dora,eva,whitened,gain:full", "--ranks", "2", "--seeds", "0,1", "--growth", 1]
    print(run("sweep", *common, *small))
