"""What errors advise: the shortest command, which works, and the nearest name."""

import re
import shlex
import shutil

import kills
import pytest
import tiny
from click.testing import CliRunner

import prep
from prep.cli import main
from prep.commands import BASIS_OF, decompose_command, store_option
from prep.errors import did_you_mean
from prep.preprocess.numerics.methods import PUBLISHED, basis_name

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A model and a calibrated store with the basis `full`."""
    path = tmp_path_factory.mktemp("messages")
    model = tiny.save(tiny.llama(), path / "model")
    data = tiny.write_data(path / "text.jsonl", tiny.texts(60))
    prep.covariance(model, data, store=path / "prep.zarr", num_sequences=8, seq_len=16, quiet=True)
    prep.decompose(path / "prep.zarr", rank=4, quiet=True)
    return path


def advised(error: pytest.ExceptionInfo) -> list[str]:
    """The words of the one command in backticks."""
    [command] = re.findall(r"`prep ([^`]*)`", str(error.value))
    return shlex.split(command)


def test_the_names_of_bases_are_those_of_the_published_methods():
    assert {name: basis_name(method) for name, method in PUBLISHED.items()} == BASIS_OF


@pytest.mark.parametrize("basis", sorted({*BASIS_OF.values(), "full-p2", "diagonal-bottom", "mine"} - {"full"}))
def test_the_command_for_a_missing_basis_makes_it(calibrated, tmp_path, basis):
    store = shutil.copytree(calibrated / "prep.zarr", tmp_path / "other store.zarr")
    with pytest.raises(prep.StoreError, match=f"the store has no basis '{basis}'") as error:
        _ = prep.open_store(store).bases[basis]
    done = CliRunner().invoke(main, [*advised(error), "--quiet"])
    assert done.exit_code == 0, done.output
    assert prep.open_store(store).bases[basis].status == "complete"


@pytest.mark.parametrize("published", ["corda_kpm", "pissa", "eva"])
def test_the_command_for_a_larger_rank_names_the_method(calibrated, tmp_path, monkeypatch, published):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(calibrated / "prep.zarr", "other.zarr")
    made = prep.decompose("other.zarr", for_=published, rank=4, quiet=True)
    command = made.command(6)
    assert command == f"`prep decompose --for {published} --rank 6 --overwrite --store other.zarr`"
    assert CliRunner().invoke(main, [*shlex.split(command.strip("`"))[1:], "--quiet"]).exit_code == 0
    assert prep.open_store("other.zarr").bases[made.name].method["rank"] == 6


def test_commands_are_short():
    full = {"metric": "full", "power": 0.5, "select": "top", "damping": 1e-3, "epsilon": None, "center": False}
    assert decompose_command("full", full) == "`prep decompose`"
    assert decompose_command("full-p1", full | {"power": 1}) == "`prep decompose --for corda_ipm`"
    damped = full | {"power": 1, "damping": 0.01}
    assert decompose_command("full-p1", damped, 8) == "`prep decompose --for corda_ipm --damping 0.01 --rank 8`"
    assert decompose_command("damped", full | {"damping": 0.01}) == "`prep decompose --name damped --damping 0.01`"


def test_the_default_store_is_not_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREP_STORE", raising=False)
    assert [store_option(given) for given in ("prep.zarr", "./prep.zarr", tmp_path / "prep.zarr")] == [""] * 3
    assert store_option(tmp_path / "a b.zarr") == " --store 'a b.zarr'"
    assert store_option("/elsewhere/a.zarr") == " --store /elsewhere/a.zarr"
    assert store_option("s3://bucket/prep.zarr") == " --store s3://bucket/prep.zarr"
    monkeypatch.setenv("PREP_STORE", "other.zarr")
    assert store_option("prep.zarr") == " --store prep.zarr"
    assert store_option(tmp_path / "other.zarr") == ""


def test_the_nearest_name():
    assert did_you_mean("gian", ["gain", "dense"]) == " (did you mean 'gain'?)"
    assert did_you_mean("down_proj", [LAYER]) == f" (did you mean '{LAYER}'?)"
    assert did_you_mean("float64", ["float32", "float16"]) == ""  # another one, not a slip
    assert did_you_mean("", [LAYER]) == did_you_mean("xyz", [LAYER]) == ""


def test_mistyped_names_meet_the_nearest_one(calibrated):
    store = prep.open_store(calibrated / "prep.zarr")
    model = tiny.llama()
    cases = {
        "did you mean 'full'": lambda: store.bases["fulll"],
        "the basis of corda_kpm is called 'full-p1-bottom', made with .*--for corda_kpm": lambda: store.bases[
            "corda_kpm"
        ],
        "the basis of whitened is called 'full'$": lambda: store.bases["whitened"],
        f"hold the layer .*did you mean '{LAYER}'": lambda: store.bases["full"][LAYER.replace("down", "dwon")],
        f"no moments of .*did you mean '{LAYER}'": lambda: store.moments[LAYER.removeprefix("model.")],
        "no core 'dens': .*did you mean 'dense'": lambda: prep.attach(model, store, core="dens"),
        "no option 'rotat'.*did you mean 'rotate'": lambda: prep.attach(model, store, core="rotation", rotat="U"),
        "no init 'corda': .*did you mean 'corda_": lambda: prep.peft.get_model(model, store, "corda"),
        "such as .*did you mean 'q_proj'": lambda: prep.peft.get_model(
            model, store, "whitened", target_modules=["q_prj"]
        ),
        "--for 'corda_kmp' .*did you mean 'corda_kpm'": lambda: prep.decompose(store.location, for_="corda_kmp"),
        "--targets 'gate_prj' .did you mean 'gate_proj'": lambda: prep.covariance(
            str(calibrated / "model"),
            str(calibrated / "text.jsonl"),
            targets="gate_prj",
            num_sequences=8,
            seq_len=16,
            store=calibrated / "new.zarr",
        ),
    }
    for message, act in cases.items():
        with pytest.raises(prep.PrepError, match=message) as error:
            act()
        assert "\n" not in str(error.value)


# Names that are no path here


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "models/tiny"], "cannot load the model models/tiny: it is no directory here, and the hub was not"),
        (["--model", "modle"], "cannot load the model modle: it is no directory here (did you mean 'model'?), and the"),
        pytest.param(
            ["--model", "weights.safetensors"],
            "no model at weights.safetensors: give a directory with config.json",
            marks=pytest.mark.stress,
        ),
        (
            ["--data", "data/train"],
            "data/train is no file or directory here, and the hub was not reached: check --",
        ),
        pytest.param(
            ["--data", "text.jsonlx"],
            "text.jsonlx is no file or directory here (did you mean 'text.jsonl'?), and the",
            marks=pytest.mark.stress,
        ),
        pytest.param(
            ["--data", "data/train.jsonl.gz"],
            "no such file: data/train.jsonl.gz; check --data",
            marks=pytest.mark.stress,
        ),
        (["--data", "./txt.jsonl"], "no such file: ./txt.jsonl (did you mean './text.jsonl'?); check --data"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_a_hub_that_is_not_reached_is_asked_once(calibrated, options, said):
    """In one line: the retries of the hub's client would be others."""
    given = dict(zip(options[::2], options[1::2], strict=True))
    command = [word for pair in ({"--model": "model", "--data": "text.jsonl"} | given).items() for word in pair]
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = kills.command(["covariance", *command, "--store", "none.zarr"], calibrated, environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Error: {said}") and len(done.stderr.splitlines()) == 1, done.stderr
