"""Passes under a memory budget, the dry run, and the sizes and times that options take."""

from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner

import prep
from prep import PrepError
from prep.cli import main
from prep.preprocess.calibration.part import Part
from prep.preprocess.calibration.plan import make_plan
from prep.preprocess.model.sites import Site
from prep.preprocess.options import CovarianceOptions
from prep.units import blocks_as_text, parse_blocks, parse_budget, parse_seconds, parse_size


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A tiny Llama whose down_proj has three panels, its text, and the store of a single pass."""
    given = tiny.sources(tmp_path_factory.mktemp("plan"), tiny.llama(770), sentences=120)
    options = {"model": given.model, "data": given.data, **tiny.RUN, "num_sequences": 24}
    prep.covariance(store=given.path / "whole.zarr", **options)
    return given.path, options


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_passes_give_the_single_pass_bitwise(job, tmp_path, monkeypatch):
    home, options = job
    deepest = []
    hooked = Part.hooked

    def counted(part):
        deepest.append([site.name for site in part.sites])
        return hooked(part)

    monkeypatch.setattr(Part, "hooked", counted)
    prep.covariance(store=tmp_path / "cut.zarr", memory_budget=3_500_000, **options)
    assert len(deepest) > 1
    assert sorted(name for part in deepest for name in part) == sorted(
        prep.open_store(home / "whole.zarr").moments.sites
    )
    cut, whole = tiny.contents(tmp_path / "cut.zarr"), tiny.contents(home / "whole.zarr")
    assert {name for name in whole if cut.get(name) != whole[name]} <= {"zarr.json"}  # the attribute `run`
    assert cut.keys() == whole.keys()


def test_every_pass_is_within_the_budget():
    sites = [Site(f"l{i}", (f"l{i}",), ((64, d),)) for i, d in enumerate((64, 128, 300, 64, 512, 200))]
    kinds = {site.name: "full" for site in sites}
    one = make_plan(sites, kinds, 10**9, "float64")
    assert len(one.passes) == 1
    largest = max(make_plan([site], kinds, 10**9, "float64").memory for site in sites)
    for budget in (largest, 2 * largest, one.memory):
        plan = make_plan(sites, kinds, budget, "float64")
        assert plan.memory <= budget
        assert [site for part in plan.passes for site in part] == sites
        assert plan.disk == one.disk == 2 * make_plan(sites, kinds, budget, "float32").disk
    with pytest.raises(PrepError, match=r"l4 needs .* raise it, or take --moment auto"):
        make_plan(sites, kinds, largest - 1, "float64")


def test_a_dry_run_predicts_and_stores_nothing(job, tmp_path):
    home, options = job
    estimate = prep.covariance(store=tmp_path / "d.zarr", dry_run=True, **options)
    assert list(tmp_path.iterdir()) == []
    moments = prep.open_store(home / "whole.zarr").moments
    assert (estimate.layers, estimate.sites) == (len(moments), len(moments.sites))
    assert (estimate.tokens, estimate.passes) == (24 * 16, 1)
    chunks = sum(file.stat().st_size for file in (home / "whole.zarr").rglob("*") if file.name != "zarr.json")
    assert estimate.disk == pytest.approx(chunks, rel=0.1)
    assert 3 * estimate.accumulators == 2 * estimate.disk  # float64, and the first half in float32
    assert estimate.seconds > 0


def test_the_command_prints_the_estimate(job, tmp_path):
    _, options = job
    command = ["covariance", "--dry-run", "--model", options["model"], "--data", options["data"]]
    command += [
        "--num-sequences",
        "24",
        "--seq-len",
        "16",
        "--store",
        str(tmp_path / "s.zarr"),
        "--memory-budget",
        "3.5MB",
    ]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "passes" in done.stdout
    assert "over 384 tokens" in done.stdout
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9),
        ("500 mb", 5 * 10**8),
        ("1e9", 10**9),
        ("2k", 2000),
        ("1.5GiB", 3 * 2**29),
        ("8GiB", 2**33),
        (8000, 8000),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("2M", 2_000_000),
        ("0.5k", 500),
        ("1.5 B", 1_500_000_000),
        ("3e5", 300_000),
        ("2000", 2000),
        (64, 64),
        ("95%", 0.95),
        ("99.5 %", 0.995),
        ("100%", 1.0),
    ],
)
def test_budgets(text, budget):
    assert parse_budget(text) == budget and type(parse_budget(text)) is type(budget)


@pytest.mark.parametrize(("text", "seconds"), [("60s", 60), ("5m", 300), ("1h", 3600), ("2.5", 2.5)])
def test_times(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_size, "much"),
        (parse_size, "0"),
        (parse_size, "8"),
        (parse_size, 8),
        (parse_size, 8.5),
        (parse_seconds, "soon"),
        (parse_blocks, "3-1"),
        (parse_budget, "all"),
        (parse_budget, "64"),
        (parse_budget, "0.95"),
        (parse_budget, 0.95),
        (parse_budget, 0),
        (parse_budget, -5),
        (parse_budget, True),
        (parse_budget, "120%"),
        (parse_budget, "0%"),
        (parse_budget, "1e999"),
        (parse_budget, "2MB"),
    ],
)
def test_what_is_no_size_or_time(parse, text):
    with pytest.raises(PrepError, match=repr(text)):
        parse(text)


def test_block_numbers_have_one_spelling():
    assert parse_blocks("8, 0-2,1") == parse_blocks([0, 1, 2, 8]) == (0, 1, 2, 8)
    assert blocks_as_text((8, 0, 2, 1)) == "0-2,8"
    assert (
        CovarianceOptions("m", "d", layers="0,1,2").layers
        == CovarianceOptions("m", "d", layers=range(3)).layers
        == "0-2"
    )


def test_python_takes_what_the_command_takes_and_its_own_types():
    options = CovarianceOptions("m", "d", memory_budget="8GB", checkpoint_every="2m", dtype=torch.bfloat16, targets="q")
    assert (options.budget, options.every, options.dtype, options.targets) == (8 * 10**9, 120.0, "bfloat16", ("q",))


def test_a_dry_run_says_that_it_runs_a_sample_and_runs_no_more(job, tmp_path, monkeypatch, capsys):
    """Of 8 sequences in each pass, one to warm up and a batch of two."""
    _, options = job
    ran, add, said = [], Part.add, []

    def counted(self, batch):
        said.append(capsys.readouterr().err)
        ran.append(len(batch.inputs["input_ids"]))
        add(self, batch)

    monkeypatch.setattr(Part, "add", counted)
    options = {**options, "num_sequences": 8, "batch_size": 2, "quiet": False}
    needed = prep.covariance(store=tmp_path / "d.zarr", dry_run=True, **options)
    assert ran == [1, 2] * needed.passes
    line = "dry run: loads the model and runs a sample, 3 of 8 sequences a pass; nothing is stored\n"
    assert said[0].endswith(line)
    options |= {"num_sequences": 2}
    said.clear()
    prep.covariance(store=tmp_path / "d.zarr", dry_run=True, **options)
    assert "dry run: loads the model and runs one batch; nothing is stored" in said[0]
