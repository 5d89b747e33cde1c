"""A calibration that grows ends as one of all sequences at once, and serves the old moments meanwhile."""

import random
import re
import shutil
import statistics
from pathlib import Path

import kills
import pytest
import tiny

import prep
from prep import Interrupted, PrepError
from prep.preprocess.calibration.estimate import lines
from prep.preprocess.calibration.job import Calibration
from prep.preprocess.verify import verify
from prep.store import open_store
from prep.store.excess import percent
from prep.store.staging import beside

RUN = {"seq_len": 16, "batch_size": 4, "quiet": True}
SIZES = (8, 16, 48)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("growth")
    tiny.write_data(path / "a.jsonl", tiny.texts(400))
    tiny.write_data(path / "b.jsonl", tiny.texts(400, seed=7))
    tiny.save(tiny.llama(80), path / "model")
    return path


def calibrate(place, store, count, **options):
    data = options.pop("data", place / "a.jsonl")
    return prep.covariance(str(place / "model"), str(data), store=store, num_sequences=count, **{**RUN, **options})


def assert_same(got, wanted, tolerance=1e-12):
    assert got.moments.sites == wanted.moments.sites and got.id == wanted.id and got.corpus == wanted.corpus
    for layer in wanted.moments:
        one, other = got.moments[layer], wanted.moments[layer]
        assert one.count == other.count
        assert tiny.relative(matrix(one), matrix(other)) < tolerance
        assert tiny.relative(one.mean, other.mean.numpy()) < tolerance
        assert (one.half is None) == (other.half is None)
        if other.half is not None:
            assert (one.half.count, one.half.share) == (other.half.count, other.half.share)
            assert tiny.relative(matrix(one.half), matrix(other.half)) < 1e-6


def matrix(moment):
    found = {"full": "second_moment", "diagonal": "diagonal", "output": "output"}[moment.kind]
    return getattr(moment, found).double().numpy()


@pytest.mark.parametrize("options", [{}, {"pack": False}, {"moment": "output"}, {"memory_budget": 60_000}], ids=str)
def test_growth_equals_a_direct_run(place, tmp_path, options):
    for count in SIZES:
        grown = calibrate(place, tmp_path / "s", count, **options)
        assert grown.corpus["num_sequences"] == count
    assert_same(grown, calibrate(place, tmp_path / "whole", SIZES[-1], **options))
    assert verify(tmp_path / "s").findings == []
    assert not Path(beside(tmp_path / "s")).exists()


def test_a_last_batch_that_was_not_full(place, tmp_path):
    """6 sequences of 4 a batch: the next batch begins with sequence 7; float64, as batches round differently."""
    calibrate(place, tmp_path / "s", 6, dtype="float64")
    grown = calibrate(place, tmp_path / "s", 14, dtype="float64")
    whole = calibrate(place, tmp_path / "whole", 14, dtype="float64")
    for layer in whole.moments:
        assert tiny.relative(matrix(grown.moments[layer]), matrix(whole.moments[layer])) < 1e-6
        assert grown.moments[layer].count == whole.moments[layer].count


@pytest.mark.parametrize("halves", [True, False])
def test_less_than_twice_as_much_has_the_part_that_is_nearest_to_a_half(place, tmp_path, halves):
    """The half of the old tokens or, where that was not kept, all of them."""
    old = calibrate(place, tmp_path / "s", 16, halves=halves)
    part = {layer: old.moments[layer].half if halves else old.moments[layer] for layer in old.moments}
    before = {layer: matrix(part[layer]) for layer in part}
    grown = calibrate(place, tmp_path / "s", 20)
    for layer in grown.moments:
        half = grown.moments[layer].half
        assert half.share == (0.4 if halves else 0.8)
        assert tiny.relative(matrix(half), before[layer]) < 1e-6
    assert verify(tmp_path / "s").findings == []


def test_an_interrupted_growth_resumes_and_serves_the_old_moments_meanwhile(place, tmp_path, monkeypatch):
    calibrate(place, tmp_path / "old", 8)
    whole = calibrate(place, tmp_path / "whole", 48)
    added = Calibration._added
    for stop in (0, 3, 4, 9):

        def stopping(self, number, part, stop=stop):
            self._signals.number = 2 if number == stop else 0
            added(self, number, part)

        store = shutil.copytree(tmp_path / "old", tmp_path / f"{stop}")
        with monkeypatch.context() as patch:
            patch.setattr(Calibration, "_added", stopping)
            with pytest.raises(Interrupted):
                calibrate(place, store, 48)
        assert open_store(store).corpus["num_sequences"] == 8 and verify(store).findings == []
        assert_same(calibrate(place, store, 48), whole)


def growth_survives(place, tmp_path, count):
    """Killed at a checkpoint, then at random instants; started again until it is done, then from the small store."""
    old, whole = calibrate(place, tmp_path / "old", 8).location, calibrate(place, tmp_path / "whole", 48)
    options = {**RUN, "model": str(place / "model"), "data": str(place / "a.jsonl"), "num_sequences": 48}
    options |= {"checkpoint_every": 0.01, "quiet": False, "store": tmp_path / "s"}
    draw, store, left, starts, resumed = random.Random(2), tmp_path / "s", count, 0, 0
    seconds = None
    while left or store.exists():
        if not store.exists():
            shutil.copytree(old, store)
        said = tmp_path / f"said{starts}"
        after, dies = draw.uniform(0, seconds) if left and seconds is not None else None, starts == 0
        code, work = kills.run(kills.covariance, options, 0.02, said, after, starts % 2 == 1, dies)
        seconds, starts = seconds or (None if dies else work), starts + 1
        resumed += "resumed after" in said.read_text() if said.exists() else 0
        assert code in (0, -9), said.read_text()
        left -= code == -9
        found = open_store(store)  # the old moments or the new ones, whole
        assert found.corpus["num_sequences"] == (48 if code == 0 else found.corpus["num_sequences"])
        assert verify(store).findings == []
        if code == 0:
            assert_same(found, whole)
            shutil.rmtree(store)
        else:
            assert found.corpus["num_sequences"] in (8, 48)
    assert resumed


@pytest.mark.parametrize("count", [1, pytest.param(20, marks=pytest.mark.stress)])
def test_growth_killed(place, tmp_path, count):
    growth_survives(place, tmp_path, count)


@pytest.mark.stress
def test_growth_from_16_to_256_sequences(place, tmp_path):
    """Also unpacked, with sequences of any length."""
    tiny.write_data(tmp_path / "long.jsonl", tiny.texts(1200))
    for pack in (True, False):
        options = {"data": tmp_path / "long.jsonl", "pack": pack}
        for size in (16, 64, 256):
            grown = calibrate(place, tmp_path / f"s{pack}", size, **options)
        assert_same(grown, calibrate(place, tmp_path / f"whole{pack}", 256, **options))


def test_what_cannot_grow_is_refused(place, tmp_path):
    """Other first rows, other options, fewer sequences; the store stays as it is."""
    calibrate(place, tmp_path / "s", 16)
    before = tiny.contents(tmp_path / "s")
    changed = shutil.copy(place / "a.jsonl", tmp_path / "c.jsonl")
    calibrate(place, tmp_path / "c", 16, data=changed)
    shutil.copy(place / "b.jsonl", changed)
    with pytest.raises(PrepError, match="the data does not begin with the 16 sequences calibrated on"):
        calibrate(place, tmp_path / "c", 32, data=changed)
    with pytest.raises(PrepError, match="corpus seed: 0 there, 3 asked for"):
        calibrate(place, tmp_path / "s", 32, seed=3)
    with pytest.raises(PrepError, match="num_sequences: 16 there, 8 asked for"):
        calibrate(place, tmp_path / "s", 8)
    assert tiny.contents(tmp_path / "s") == before


def test_bases_of_fewer_sequences_are_removed_and_named(place, tmp_path, capsys):
    calibrate(place, tmp_path / "s", 8)
    prep.decompose(tmp_path / "s", rank=4, quiet=True)
    grown = calibrate(place, tmp_path / "s", 16, quiet=False)
    said = capsys.readouterr().err
    assert (
        "goes on after its 8 sequences, and serves them until 16 are in; its bases (full), made of these, go then"
        in said
    )
    assert "bases full of 8 sequences are gone: run `prep decompose` again" in said
    assert list(grown.bases) == [] and verify(tmp_path / "s").findings == []


def test_a_dry_run_tells_what_is_left(place, tmp_path, capsys):
    """Of a store of this run; one of other options would not grow."""
    store = calibrate(place, tmp_path / "s", 8).location
    before = tiny.contents(store)
    whole = calibrate(place, tmp_path / "new", 40, dry_run=True)
    capsys.readouterr()
    left = calibrate(place, store, 40, dry_run=True, quiet=False)
    assert "runs a sample, 5 of 32 sequences a pass" in capsys.readouterr().err
    assert (whole.first, whole.tokens) == (0, 640) and (left.first, left.tokens) == (8, 512)
    assert (left.disk, left.checkpoint, left.accumulators) == (whole.disk, whole.checkpoint, whole.accumulators)
    assert "passes   1 over 512 tokens, after the 8 sequences that are there" in lines(left)
    assert "passes   1 over 640 tokens" in lines(whole)
    assert calibrate(place, store, 12, dry_run=True).disk == left.disk  # the first 8 are kept as a half
    for other in ({"seed": 3}, {"moment": "diagonal"}, {"overwrite": True}):
        assert calibrate(place, store, 40, dry_run=True, **other).first == 0
    assert tiny.contents(store) == before
    grown = calibrate(place, store, 40)
    held = sum(len(raw) for name, raw in tiny.contents(store).items() if not name.endswith("zarr.json"))
    assert left.disk == pytest.approx(held, rel=0.1) and grown.corpus["num_sequences"] == 40


# --until


def excess(store, rank):
    prep.decompose(store, rank=rank, quiet=True)
    rows = [row for row in prep.evaluate(store, ranks=rank, sample=3) if row.excess is not None and row.least > 1e-9]
    return statistics.median(row.relative for row in rows)


def test_until_stops_where_the_doubling_table_says(place, tmp_path, capsys):
    sizes = (8, 16, 32)
    table = {size: excess(calibrate(place, tmp_path / f"{size}", size).location, 8) for size in sizes}
    assert table[8] > table[16] > table[32]
    target = (table[16] + table[32]) / 2
    grown = calibrate(place, tmp_path / "s", 64, until=f"{100 * target}%", rank=8, quiet=False)
    said = capsys.readouterr().err
    assert grown.corpus["num_sequences"] == 32
    assert f"16 sequences: rank-8 bases lose {percent(table[16])} more output than they need: twice as many" in said
    assert f"32 sequences: rank-8 bases lose {percent(table[32])} more output than they need: --until" in said
    assert_same(grown, open_store(tmp_path / "32"))
    before = tiny.contents(tmp_path / "s")
    calibrate(place, tmp_path / "s", 64, until=target, rank=8)
    assert tiny.contents(tmp_path / "s") == before
    grown = calibrate(place, tmp_path / "s", 48, until=table[32] / 100, rank=8, quiet=False)
    assert grown.corpus["num_sequences"] == 48
    assert "48 sequences" in (said := capsys.readouterr().err) and "all are in before --until" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": "2"}, "'2' is not a share between 0 and 1: write it like 2% or 0.02"),
        ({"until": "little"}, "'little' is not a share"),
        ({"until": 0.02, "moment": "diagonal"}, "--until needs both halves of the moments"),
        ({"until": 0.02, "halves": False}, "--until needs both halves of the moments"),
        ({"until": 0.02, "dry_run": True}, "and no --dry-run"),
        ({"rank": 8}, "--rank belongs to --until"),
        ({"until": 0.02, "rank": 0}, "--rank 0 is too small"),
        ({"until": 0.02, "rank": 500}, "a --rank below that of the layers"),
        ({"until": 0.02, "batch_size": 16}, "two batches or more"),
    ],
)
def test_until_refuses_in_one_line(place, tmp_path, options, message):
    with pytest.raises(PrepError, match=re.escape(message)) as caught:
        calibrate(place, tmp_path / "s", 8, **options)
    assert len(str(caught.value).splitlines()) == 1
