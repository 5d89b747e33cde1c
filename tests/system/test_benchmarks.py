"""Every benchmark runs to its end on a tiny model, which includes its own comparison of results."""

import json
import re
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


def test_files(run, made):
    sizes = ["--rank", 4, "--rounds", 1, "--delay", 0]
    printed = run("files", "--model", made["model"], "--store", made["store"], *sizes)
    assert all(text in printed for text in (" files, ", "\nattach from disk ", "\nattach from server "))


def test_adapters(run):
    printed = run("adapters", "--d-in", 24, "--d-out", 16, "--rank", 4, "--tokens", 8, "--rounds", 1)
    assert all(f"\n{core} " in printed for core in ("base", "peft lora", "gain", "rotation", "dense"))


def test_peft_startup(run, made):
    printed = run("peft_startup", "--model", made["model"], "--store", made["store"], "--rank", 4)
    assert "PiSSA, rank 4, 14 layers" in printed
    assert "there PEFT is" in printed


def test_repair(run, tmp_path):
    pytest.importorskip("bitsandbytes")
    given = tiny.sources(tmp_path, tiny.wide(), sentences=120)
    files = ["--train", given.data, "--test", given.data, "--template", "{text}", "--work", tmp_path / "work"]
    sizes = ["--sequences", 30, "--seq-len", 16, "--ranks", 2, 4, "--rows", 3, "--blocks", ".1."]
    printed = run("repair", "--model", given.model, *files, *sizes, "--recipes", "nf4", "int3")
    assert "480 tokens of" in printed
    assert "of 56 cases: whitened > diagonal in 0, diagonal > plain SVD in" in printed
    assert "\n7 layers, sqrtm: " in printed


@pytest.mark.stress
@pytest.mark.parametrize("kind", ["llama", "moe"])
def test_large(run, tmp_path, kind):
    model, store = tmp_path / "model", tmp_path / "s.zarr"
    assert " parameters in 2 blocks, " in run(
        "large", "make", kind, "--path", model, "--shrink", 32, "--billions", 1e-9
    )
    where = ["--model", model, "--store", store]
    printed = run("large", "covariance", *where, "--num-sequences", 4, "--seq-len", 16)
    printed += run("large", "decompose", *where, "--rank", 4)
    assert " layers calibrated on 64 tokens, in " in printed and " in metric full, in " in printed
    assert all(0 < float(share) <= 1.001 for share in re.findall(r"([0-9.]+) of its size", printed))


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


@pytest.fixture
def sweep(run, made, questions, tmp_path):
    """Run a small sweep in tmp_path/work with these further arguments."""
    train, held = questions
    common = ["--model", made["model"], "--data", train, "--evaluation", held, "--work", tmp_path / "work", *SMALL]
    return lambda *further: run("sweep", *common, *further)


METHODS = ["lora", "dora", "eva", "whitened", "gain:full", "rotation:diagonal:both"]


def test_sweep(sweep, run, tmp_path):
    grid = ["--methods", ",".join(METHODS), "--ranks", 2, "--seeds", "0,1", "--growth", 1]
    sweep(*grid)
    path, page = tmp_path / "work" / "runs.jsonl", tmp_path / "page.md"
    lines = path.read_text().splitlines()
    setting, store, base, *runs = map(json.loads, lines)
    assert [line["kind"] for line in (setting, store, base)] == ["setting", "store", "base"]
    assert len(base["losses"]) == len(base["tokens"]) == len(runs[0]["losses"]) == setting["evaluation"]["rows"] == 6
    assert {run["method"] for run in runs} == set(METHODS) and {run["seed"] for run in runs} == {0, 1}
    assert len({(run["method"], run["rate"], run["seed"]) for run in runs}) == len(runs)
    assert all(run["losses"] != base["losses"] and run["trainable"] > 0 for run in runs)

    path.write_text("\n".join(lines[:-2]) + lines[-2][:40])  # a kill while a line was written
    sweep(*grid)
    again = [json.loads(line) for line in path.read_text().splitlines()[3:]]
    untimed = [[{**run, "start": 0, "step": 0, "wall": 0} for run in found] for found in (runs, again)]
    assert untimed[0] == untimed[1]

    page.write_text("# Page\n\n<!-- begin: made by benchmarks/evidence.py -->\nold\n<!-- end -->\nrest\n")
    run("evidence", path, "--page", page)
    written = page.read_bytes(), (tmp_path / "runs.svg").read_bytes()
    assert all(f"\n| `{method}` | ".encode() in written[0] for method in METHODS) and b"old" not in written[0]
    assert xml.etree.ElementTree.fromstring(written[1]).tag.endswith("svg")
    run("evidence", path, "--page", page)
    assert (page.read_bytes(), (tmp_path / "runs.svg").read_bytes()) == written

    larger = sweep("--methods", "whitened", "--ranks", "4", "--seeds", "0", "--growth", 0)
    assert larger.count("whitened         r 4 ") == 3

    with pytest.raises(SystemExit, match="another steps: take another --work"):
        sweep("--methods", "lora", "--steps", 3)


def test_sweep_of_a_quantised_base(sweep, run, tmp_path):
    pytest.importorskip("bitsandbytes")
    sweep("--base", "nf4", "--methods", "lora,loftq,repair", "--ranks", 2, "--seeds", 0, "--growth", 0, "--every", 1)
    path, page = tmp_path / "work" / "runs.jsonl", tmp_path / "page.md"
    setting, _, base, whole, *runs = map(json.loads, path.read_text().splitlines())
    assert setting["base"] == "nf4" and whole["kind"] == "float" and whole["losses"] != base["losses"]
    start = {line["method"]: line["course"]["0"] for line in runs}
    assert start["lora"] == pytest.approx(sum(base["losses"]), abs=0.01)
    assert len(set(start.values())) == 3 and len(runs) == 9
    page.write_text("<!-- begin: made by benchmarks/evidence.py -->\n<!-- end -->\n")
    run("evidence", path, "--page", page)
    assert page.read_text().count("| `repair` | ") == 3 and "| method | 0 | 1 | 2 |" in page.read_text()
    assert "packed as nf4" in page.read_text() and "](runs.svg)" in page.read_text()


def test_sweep_refuses_rows_of_two_parts(sweep, questions, tmp_path):
    train, held = questions
    rows = train.read_text().splitlines()
    for first, second, file, text in (
        ("calibration", "evaluation", held, rows[0]),
        ("training", "evaluation", held, rows[-1].replace("w", "W").replace(" ", "  ")),
        ("calibration", "training", train, rows[1]),
    ):
        changed = tmp_path / "changed.jsonl"
        changed.write_text(f"{file.read_text()}{text}\n")
        option = "--data" if file == train else "--evaluation"
        with pytest.raises(SystemExit, match=f"a row is in {first} and in {second}: "):
            sweep(option, changed, "--evaluation-rows", 99)
    with pytest.raises(SystemExit, match="no row is left for training"):
        sweep("--calibration-rows", 999)
    assert not (tmp_path / "work" / "prep.zarr").exists()


def simulated(missing, grid, loss):
    """The lines of a whole sweep in which a run's loss is given by a function."""
    lines = [{"kind": "base", "tokens": [1, 1]}]
    while wave := missing(grid, lines):
        lines += [{"kind": "run", **vars(run), "losses": [loss(run)] * 2} for run in wave]
    return lines


def test_sweep_design(monkeypatch):
    """The best rate is inside the grid wherever it lies, and it and its neighbours run with every seed."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from outcomes import best_rate, curve
    from sweep import Grid, missing

    valleys = {"lora": 1e-5, "pissa": 1.1e-3, "gain:full": 3e-1}
    grid = Grid(list(valleys), ranks=[8, 32], seeds=[0, 1, 2], factor=3.0, growth=9)
    lines = simulated(missing, grid, lambda run: abs(np.log(run.rate / valleys[run.method])) + 0.1 * run.seed)
    for method, valley in valleys.items():
        for rank in grid.ranks:
            losses, best = curve(lines, method, rank), best_rate(lines, method, rank)
            place = list(losses).index(best)
            assert abs(np.log(best / valley)) <= np.log(3) / 2 + 0.01
            assert [len(found) for found in list(losses.values())[place - 1 : place + 2]] == [3, 3, 3]
        assert len(curve(lines, method, 32)) == 3  # it begins where rank 8 had its best
    order = [(line["rank"], line["seed"]) for line in lines[1:]]
    assert order == sorted(order)
    assert [line["method"] for line in lines[1:10]] == list(valleys) * 3
    alone = simulated(missing, Grid(["lora"], [8], [0, 1], 3.0, 9, beside=False), lambda run: abs(np.log(run.rate)))
    assert [line["rate"] for line in alone[1:] if line["seed"]] == [best_rate(alone, "lora", 8)]
    monotone = simulated(missing, Grid(["lora"], [8], [0], factor=3.0, growth=2), lambda run: run.rate)
    assert len(monotone) == 1 + 3 + 2


def test_differences(monkeypatch):
    """Of rows of one length and one seed: the standard error of a paired mean. Seeds add theirs, pooled."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from outcomes import difference, seed_variance

    draw = np.random.default_rng(0)
    rows = draw.normal(size=(2, 40))
    one = difference([list(rows[0] * 5)], [5] * 40, 0.0)
    assert one.value == pytest.approx(rows[0].mean())
    assert one.error == pytest.approx(rows[0].std(ddof=1) / np.sqrt(40))
    other = [list(rows[1]), list(rows[1] + 0.2), list(rows[1])]
    pooled = seed_variance([[list(rows[0]), list(rows[0] + 0.1)], other, [list(rows[0])]], 40)
    assert pooled == pytest.approx((np.var([0, 0.1], ddof=1) + 2 * np.var([0, 0.2, 0], ddof=1)) / 3)
    both = difference(other, [1] * 40, pooled)
    assert both.error == pytest.approx(np.sqrt(rows[1].var(ddof=1) / 40 + pooled / 3))
    lengths = draw.integers(1, 9, 40)
    assert difference([list(0.3 * lengths)], lengths.tolist(), 0.0).error == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("name", "lines"), [("evidence.md", "evidence"), ("quantised.md", "qlora")])
def test_evidence_is_made_of_its_lines(run, tmp_path, name, lines):
    docs = BENCHMARKS.parent / "docs"
    page = tmp_path / name
    page.write_bytes((docs / name).read_bytes())
    run("evidence", docs / f"{lines}.jsonl", "--page", page)
    assert page.read_bytes() == (docs / name).read_bytes()
    assert (tmp_path / f"{lines}.svg").read_bytes() == (docs / f"{lines}.svg").read_bytes()
