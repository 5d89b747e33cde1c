"""What a command does with a store that is there: resumed, refused, replaced, left alone; and what another one did."""

import os
import shutil
import signal
import time
from types import SimpleNamespace

import kills
import pytest
import tiny
import torch
from transformers import AutoConfig

import prep
from prep import PrepError, StoreError
from prep.preprocess.calibration import job
from prep.preprocess.calibration.job import Calibration
from prep.preprocess.model.loading import resolved_dtype
from prep.store import BasisWriter, open_store
from prep.store.checkpoint import read_checkpoint
from prep.store.staging import beside

LARGE, SMALL = 10**9, 60_000  # bytes: one pass, several passes
BATCHES = 5


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, text and the store of an uninterrupted run."""
    made = tiny.sources(tmp_path_factory.mktemp("made"), sentences=80)
    made.options = {"num_sequences": 2 * BATCHES, "seq_len": 16, "batch_size": 2}
    made.options |= {"quiet": True, "checkpoint_every": 0.0}
    made.whole = made.path / "whole"
    prep.covariance(made.model, made.data, store=made.whole, **made.options)
    return made


@pytest.fixture
def run(made, tmp_path):
    """A copy of the model, so that its weights may change, and a function that calibrates it into `tmp_path / "s"`."""
    model = str(shutil.copytree(made.model, tmp_path / "model"))

    def covariance(**changed):
        return prep.covariance(model, made.data, store=tmp_path / "s", **{**made.options, **changed})

    return SimpleNamespace(model=model, covariance=covariance, store=tmp_path / "s")


class Killed(BaseException):
    """Ends a command where a kill would have."""


def killed(monkeypatch, command, batches=0, cls=Calibration, method="_added"):
    """Run a command that dies after so many batches, or calls of another method."""
    whole, left = getattr(cls, method), [batches]

    def dies(self, *arguments):
        result = whole(self, *arguments)
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return result

    with monkeypatch.context() as patch:
        patch.setattr(job, "CHECKPOINT_SHARE", float("inf"))  # a checkpoint after every batch
        patch.setattr(cls, method, dies)
        with pytest.raises(Killed):
            command()


def other_weights(directory, scale=1.5):
    """Change the weights of a saved model in place."""
    model = prep.preprocess.model.loading.load_model(str(directory), dtype="float32")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= scale
    model.save_pretrained(directory)


def moments_equal(a, b):
    a, b = open_store(a).moments, open_store(b).moments
    assert a.sites == b.sites
    assert all(torch.equal(a[layer].second_moment, b[layer].second_moment) for layer in b)


# Another memory budget


@pytest.mark.parametrize("batches", [3, BATCHES + 3])
@pytest.mark.parametrize(("before", "after"), [(SMALL, LARGE), (LARGE, SMALL), (SMALL, 3 * SMALL)])
def test_resumed_under_another_budget(made, run, monkeypatch, before, after, batches):
    """Stopped in a pass, the first or a later one, and resumed with passes of another size."""
    if before == LARGE and batches > BATCHES:
        pytest.skip("a single pass has no more batches")
    killed(monkeypatch, lambda: run.covariance(memory_budget=before), batches)
    known = read_checkpoint(open_store(run.store).root)
    assert known["batches"] == batches % BATCHES and bool(known["done"]) == (batches > BATCHES)
    run.covariance(memory_budget=after)
    moments_equal(run.store, made.whole)


def test_a_store_is_complete_only_with_all_its_sites(made, run, monkeypatch):
    killed(monkeypatch, lambda: run.covariance(memory_budget=SMALL), BATCHES + 1)
    parts = Calibration.parts
    monkeypatch.setattr(Calibration, "parts", lambda self: list(parts(self))[:1])
    monkeypatch.setattr(Calibration, "write", lambda self, part: None)
    with pytest.raises(PrepError, match="has no moments yet"):
        run.covariance(memory_budget=SMALL)
    assert open_store(run.store).status == "incomplete"


# Other weights in the same place


def test_other_weights_are_refused_on_resume(made, run, monkeypatch):
    killed(monkeypatch, run.covariance, 2)
    other_weights(run.model)
    before = tiny.contents(run.store)
    with pytest.raises(PrepError, match=r"was made from other weights than .* has now"):
        run.covariance()
    assert tiny.contents(run.store) == before
    run.covariance(overwrite=True)
    assert open_store(run.store).model["weights"] != open_store(made.whole).model["weights"]


def test_other_weights_are_refused_on_a_complete_store(run, capsys):
    run.covariance()
    run.covariance(quiet=False)
    assert "nothing to do" in capsys.readouterr().err
    os.utime(f"{run.model}/model.safetensors")  # another time, the same weights
    run.covariance(quiet=False)
    assert "nothing to do" in capsys.readouterr().err
    other_weights(run.model)
    with pytest.raises(PrepError, match=r"was made from other weights than .* has now"):
        run.covariance()


def test_other_weights_are_refused_by_decompose(made, run, tmp_path):
    run.covariance()
    prep.decompose(run.store, rank=4, quiet=True)
    other_weights(run.model)
    with pytest.raises(PrepError, match="has other weights than the store was calibrated on"):
        prep.decompose(run.store, metric="identity", rank=4, quiet=True)
    with pytest.raises(PrepError, match="has other weights than the store was calibrated on"):
        prep.decompose(run.store, rank=4, quiet=True)
    named = str(shutil.copytree(run.model, tmp_path / "named"))
    prep.decompose(run.store, model=named, name="other", rank=4, quiet=True)  # another model, by its name
    bases = prep.decompose(tmp_path / "bases", model=named, metric="identity", rank=4, quiet=True)
    other_weights(named)
    with pytest.raises(StoreError, match="basis 'identity' was made from other weights"):
        prep.decompose(tmp_path / "bases", model=named, metric="identity", rank=4, quiet=True)
    again = prep.decompose(tmp_path / "bases", model=named, metric="identity", rank=4, overwrite=True, quiet=True)
    assert again.hash != bases.hash


# What `auto` means


def test_auto_is_the_dtype_that_it_stands_for(made, run, monkeypatch):
    killed(monkeypatch, run.covariance, 2)
    assert open_store(run.store).options["dtype"] == "float32"
    with pytest.raises(PrepError, match="options dtype: 'float32' there, 'bfloat16' asked for"):
        run.covariance(dtype="bfloat16")
    run.covariance(dtype="float32")
    moments_equal(run.store, made.whole)


def test_auto_follows_the_device():
    config = AutoConfig.for_model("llama", dtype="bfloat16")
    assert resolved_dtype("auto", config, "cpu") == "float32"
    assert resolved_dtype("auto", config, "cuda:1") == "bfloat16"
    assert resolved_dtype("float16", config, "cpu") == "float16"


# Overwriting


def test_an_interrupted_overwrite_is_resumed_and_harms_nothing(made, run, monkeypatch):
    run.covariance(seed=7)
    prep.decompose(run.store, rank=4, quiet=True)
    before = tiny.contents(run.store)
    killed(monkeypatch, lambda: run.covariance(overwrite=True), 2)
    assert tiny.contents(run.store) == before
    assert read_checkpoint(open_store(beside(run.store)).root)["batches"] == 2
    killed(monkeypatch, lambda: run.covariance(overwrite=True), 2)  # of what is left
    assert read_checkpoint(open_store(beside(run.store)).root)["batches"] == 4
    run.covariance(overwrite=True)
    moments_equal(run.store, made.whole)
    assert not beside(run.store).exists()


def test_overwriting_resumes_an_unfinished_store_of_the_same_run(made, run, monkeypatch):
    killed(monkeypatch, run.covariance, 3)
    killed(monkeypatch, lambda: run.covariance(overwrite=True), 1)
    assert read_checkpoint(open_store(run.store).root)["batches"] == 4
    run.covariance(overwrite=True)
    moments_equal(run.store, made.whole)


def test_an_interrupted_overwrite_of_a_basis_is_resumed_and_harms_nothing(made, run, monkeypatch, capsys):
    shutil.copytree(made.whole, run.store)
    prep.decompose(run.store, rank=4, quiet=True)
    before = open_store(run.store).bases["full"].hash

    def replace():
        return prep.decompose(run.store, rank=6, overwrite=True)

    with monkeypatch.context() as patch:
        patch.setattr("prep.store.basis_writer.FLUSH_SECONDS", 0.0)
        killed(monkeypatch, replace, 3, BasisWriter, "note")
    bases = open_store(run.store).bases
    assert bases["full"].hash == before and len(bases.pending("full").layers) == 3
    capsys.readouterr()
    assert replace().method["rank"] == 6
    assert "resumed after 3 of 14 layers" in capsys.readouterr().err
    assert open_store(run.store).bases.pending("full") is None


# Another writer


def test_a_store_that_another_writer_completes_meanwhile_is_not_replaced(made, run, monkeypatch):
    """It is looked at again under the lock: what came while the model was loaded stays."""
    from prep.preprocess import covariance as stage

    load = stage._load

    def slowly(options, world):
        monkeypatch.setattr(stage, "_load", load)
        run.covariance(seed=7)
        return load(options, world)

    monkeypatch.setattr(stage, "_load", slowly)
    with pytest.raises(PrepError, match="corpus seed: 7 there, 0 asked for"):
        run.covariance()
    assert open_store(run.store).corpus["seed"] == 7


def test_a_basis_that_another_writer_completes_meanwhile_is_not_replaced(made, run, monkeypatch, capsys):
    from prep.preprocess import decompose as stage

    shutil.copytree(made.whole, run.store)
    load = stage.load_layers

    def slowly(*given):
        monkeypatch.setattr(stage, "load_layers", load)
        prep.decompose(run.store, rank=4, quiet=True)
        prep.decompose(run.store, rank=4, name="mine", quiet=True)
        return load(*given)

    monkeypatch.setattr(stage, "load_layers", slowly)
    with pytest.raises(StoreError, match="rank: 4 there, 5 asked for"):
        prep.decompose(run.store, rank=5, quiet=True)
    monkeypatch.setattr(stage, "load_layers", slowly)
    shutil.rmtree(run.store)
    shutil.copytree(made.whole, run.store)
    prep.decompose(run.store, rank=4)
    assert "nothing to do" in capsys.readouterr().err
    assert list(open_store(run.store).bases) == ["full", "mine"]


def test_bases_are_added_to_a_store_however_it_is_spelled(made, run, tmp_path):
    """Metric identity needs no store, and so begins one where none is: never over one that is there."""
    shutil.copytree(made.whole, run.store)
    (tmp_path / "link").symlink_to(run.store)
    for i, place in enumerate((f"file://{run.store}", tmp_path / "link", f"{tmp_path}/./s")):
        prep.decompose(place, metric="identity", model=run.model, rank=2, name=f"b{i}", quiet=True)
    moments_equal(run.store, made.whole)
    assert list(open_store(run.store).bases) == ["b0", "b1", "b2"]
    assert prep.covariance(made.model, made.data, store=f"file://{made.whole}", **made.options).id  # nothing to do


def test_a_store_that_appears_while_the_model_is_loaded_is_not_replaced(made, run, monkeypatch):
    from prep.preprocess import decompose as stage

    load = stage.load_layers

    def slowly(*given):
        shutil.copytree(made.whole, run.store)
        return load(*given)

    monkeypatch.setattr(stage, "load_layers", slowly)
    with pytest.raises(StoreError, match="was made by another process meanwhile: run the same command again"):
        prep.decompose(run.store, metric="identity", model=run.model, rank=2, quiet=True)
    moments_equal(run.store, made.whole)


# Signals


def test_ctrl_c_is_a_keyboard_interrupt_and_the_state_is_stored(made, run, monkeypatch):
    """`except Exception` of a script does not swallow it."""
    added = Calibration._added

    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        added(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Calibration, "_added", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"stopped after 1 batches, .* the same command resumes") as stop:
            run.covariance()
    assert not isinstance(stop.value, Exception)
    assert open_store(run.store).status == "incomplete"
    run.covariance()
    moments_equal(run.store, made.whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_with_the_shell_s_code_and_one_line(made, run, number):
    text = tiny.write_data(run.store.parent / "long.jsonl", tiny.texts(3000))
    options = ["--model", run.model, "--data", text, "--store", str(run.store), "--quiet", "--checkpoint-every", "0s"]
    options += ["--num-sequences", "1000", "--seq-len", "16", "--batch-size", "1"]
    command = kills.Command(["covariance", *options], run.store.parent)
    while not (run.store / "checkpoint").exists():
        assert command.process.is_alive()
        time.sleep(0.02)
    os.kill(command.process.pid, number)
    done = command.ended()
    assert done.returncode == 128 + number
    assert done.stderr.startswith("Error: stopped after") and len(done.stderr.splitlines()) == 1
