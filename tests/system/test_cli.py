"""The command line: the way through, one line for each mistake with no harm to a store, and damage that is named."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kills
import pytest
import tiny
import torch
import zarr
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import prep
from prep import StoreError
from prep.cli import main
from prep.preprocess import progress
from prep.store import create_store
from prep.store.format.schema import sealed

COMMAND = [sys.executable, "-m", "prep.cli"]
SHORT = ["--num-sequences", "8", "--seq-len", "16", "--batch-size", "4"]
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, text, a complete store with a basis, and stores of other moment kinds."""
    made = tiny.sources(tmp_path_factory.mktemp("made"))
    for moment in ("full", "diagonal", "output"):
        prep.covariance(made.model, made.data, store=made.path / moment, moment=moment, **tiny.RUN)
    prep.decompose(made.path / "full", rank=4, quiet=True)
    return made


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """An empty working directory with a copy of the complete store as `prep.zarr`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREP_STORE", raising=False)
    shutil.copytree(made.path / "full", "prep.zarr")
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments, store="prep.zarr"):
    """The one line on stderr of a command that must exit with 2, print nothing else, and leave `store` as it was."""
    before = tiny.contents(store) if Path(store).exists() else None
    result = invoke(*arguments)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert (result.exit_code, result.stdout) == (2, "")
    assert (tiny.contents(store) if Path(store).exists() else None) == before
    [line] = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


def covariance(made, *options, model=None, data=None):
    return ["covariance", "--model", model or made.model, "--data", data or made.data, *SHORT, *options]


def edited(source, target, **changes):
    """A copy of a model with other values in its configuration."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return str(target)


def with_weight(made, target, layer, value):
    """A copy of the model with one weight of `layer` set to `value`."""
    shutil.copytree(made.model, target)
    weights = load_file(target / "model.safetensors")
    weights[f"{layer}.weight"][0, 0] = value
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def set_attributes(store, **changes):
    head = json.loads(Path(store, "zarr.json").read_text())
    head["attributes"] = sealed(head["attributes"] | changes)
    Path(store, "zarr.json").write_text(json.dumps(head))


# The way through


def interpreter(arguments, folder, environment=None):
    """The command as a user starts it; kills.command does so without importing everything anew."""
    environment = {**os.environ, **(environment or {})}
    return subprocess.run([*COMMAND, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "process", [kills.command, pytest.param(interpreter, marks=pytest.mark.stress)], ids=["forked", "new"]
)
def test_the_way_through_in_real_processes(made, tmp_path, process):
    def run(*arguments):
        done = process(arguments, tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines(), done.stderr.splitlines()

    out, err = run(*covariance(made))
    assert out == ["prep.zarr: 14 layers, 8 sites, 128 tokens", "next: prep decompose"]
    assert len(err) == 1 and err[0].startswith("covariance: 128 of 128 tokens in ") and err[0].endswith(" tokens/s")
    out, err = run("decompose", "--rank", "4")
    assert out[0].startswith("prep.zarr: basis full, 14 layers, rank 4, captured energy 0.")
    assert out[1:] == ["next: prep info"]
    assert len(err) == 1 and err[0].startswith("decompose full: 14 of 14 layers in ")
    out, err = run("info")
    assert err == []
    assert out[-1] == 'next, in Python: prep.attach(model, "prep.zarr", core="gain", basis="full")'
    assert set(prep.open_store(tmp_path / "prep.zarr").bases["full"]) == set(
        prep.open_store(made.path / "full").moments
    )


def test_next_commands_name_the_store(made, here):
    out = invoke(*covariance(made, "--store", "other.zarr")).stdout
    assert out.splitlines()[-1] == "next: prep decompose --store other.zarr"
    out = invoke("info", "--store", "other.zarr").stdout
    assert out.splitlines()[-1] == "next: prep decompose --store other.zarr"
    out = invoke("decompose", "--store", "other.zarr", "--for", "pissa").stdout
    assert out.splitlines()[-1] == "next: prep info --store other.zarr"


def test_the_store_may_come_from_the_environment(made, here, monkeypatch):
    monkeypatch.setenv("PREP_STORE", "elsewhere.zarr")
    assert invoke(*covariance(made)).stdout.startswith("elsewhere.zarr: 14 layers")
    assert invoke("decompose", "--for", "pissa").exit_code == 0
    assert list(prep.open_store("elsewhere.zarr").bases) == ["identity"]


def test_info_is_a_table_and_json(made, here):
    lines = invoke("info").stdout.splitlines()
    assert lines[0].startswith("store    prep.zarr (complete, ")
    assert f"model    {made.model} (LlamaForCausalLM, float32)" in lines
    assert f"corpus   {made.data}, train: 8 x 16, packed, 128 tokens" in lines
    assert "moments  14 layers, 8 sites (8 full), 0 MB" in lines
    rows = {line.split()[0]: line.split() for line in lines if line}
    assert rows["full"][:6] == ["full", "full", "0.5", "top", "4", "0.001"]
    table = [line.split() for line in lines if line.startswith("model.layers.*.mlp.down_proj")]
    energies = [layer.energy for name, layer in prep.open_store("prep.zarr").bases["full"].items() if "down" in name]
    assert table[0] == ["model.layers.*.mlp.down_proj", "2", "32", "48", "full", "128"]
    assert table[1][1] == f"{sum(energies) / 2:.3f}"

    result = invoke("info", "--json")
    printed = json.loads(result.stdout)
    assert result.stderr == ""
    assert (printed["status"], printed["model"]["id"], printed["corpus"]["tokens"]) == ("complete", made.model, 128)
    assert (printed["moments"]["layers"], printed["moments"]["sites"]) == (14, 8)
    assert printed["bases"]["full"]["layers"] == printed["bases"]["full"]["of"] == 14
    assert printed["bases"]["full"]["method"]["rank"] == 4
    assert printed["layers"]["model.layers.*.mlp.down_proj"]["shape"] == [32, 48]
    assert printed["bytes"] == sum(map(len, tiny.contents("prep.zarr").values()))


def test_quiet_commands_print_nothing(made, here):
    for arguments in [
        covariance(made, "--store", "q.zarr", "--quiet"),
        covariance(made, "--store", "q.zarr", "-q"),
        ["decompose", "--store", "q.zarr", "--quiet"],
        ["decompose", "--store", "q.zarr", "--quiet"],
    ]:
        result = invoke(*arguments)
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_the_same_command_on_a_complete_store_does_nothing(made, here):
    before = tiny.contents("prep.zarr")
    result = invoke(*covariance(made))
    assert result.exit_code == 0
    assert result.stderr == "prep.zarr is complete and was made with the same options: nothing to do\n"
    result = invoke("decompose", "--rank", "4")
    assert result.exit_code == 0
    assert result.stderr == "basis 'full' is complete and was made with the same options: nothing to do\n"
    assert tiny.contents("prep.zarr") == before


def test_an_incomplete_store_is_begun_anew(made, here):
    set_attributes("prep.zarr", status="incomplete")
    for command in (["decompose"], ["decompose", "--for", "pissa"]):
        assert "is not complete: run the same `prep covariance` command again" in refused(*command)
    shown = invoke("info")
    assert (shown.exit_code, json.loads(invoke("info", "--json").stdout)["status"]) == (0, "incomplete")
    assert "(incomplete, " in shown.stdout.splitlines()[0]
    assert "run the same `prep covariance` command again" in shown.stdout.splitlines()[0]
    result = invoke(*covariance(made))
    assert result.exit_code == 0
    assert re.search(r"^prep.zarr is incomplete.*: begun anew\ncovariance: 128 of 128 tokens", result.stderr)
    before, after = tiny.contents(made.path / "full"), tiny.contents("prep.zarr")
    assert {name: after[name] for name in after if name != "zarr.json"} == {
        name: before[name] for name in before if name != "zarr.json"
    }


def test_an_incomplete_store_of_another_run_is_refused(made, here):
    set_attributes("prep.zarr", status="incomplete")
    assert "options moment: 'full' there, 'diagonal' asked for" in refused(*covariance(made, "--moment", "diagonal"))


def test_overwrite_replaces_store_and_bases(made, here):
    result = invoke(*covariance(made, "--moment", "diagonal", "--overwrite"))
    assert (result.exit_code, list(prep.open_store("prep.zarr").bases)) == (0, [])
    assert prep.open_store("prep.zarr").moments[DOWN].kind == "diagonal"


# Mistakes: each with --overwrite too, which must not harm the store before everything is known to be good

MISTAKES = {
    "no model": (["--model", "/nowhere/model"], "no model at /nowhere/model"),
    "no relative model": (["--model", "./nowhere"], "no model at ./nowhere"),
    "no deep model": (["--model", "a/b/c"], "no model at a/b/c"),
    "no file": (["--data", "none.jsonl"], "no such file: none.jsonl"),
    "no match": (["--data", "*.parquet"], "no file matches"),
    "column": (["--text-column", "nope"], "--text-column names 'nope'"),
    "template": (["--template", "{nope}"], "--template names 'nope'"),
    "chat": (["--chat-column", "text"], "no chat template"),
    "subset": (["--subset", "main"], "--subset main"),
    "split": (["--split", "nope"], "no split 'nope'"),
    "empty": (["--data", "empty.jsonl"], "empty.jsonl holds no text"),
    "blank": (["--data", "blank.jsonl"], "blank.jsonl holds no text"),
    "short": (["--num-sequences", "500"], "500 were asked for"),
    "long": (["--seq-len", "65", "--num-sequences", "2"], "the model takes 64"),
    "targets": (["--targets", "nope"], "no layer matches --targets 'nope'"),
    "not linear": (["--targets", "norm$"], "a LlamaRMSNorm"),
    "expression": (["--targets", "("], "not a regular expression"),
    "layers": (["--layers", "9"], "block 9"),
    "numbers": (["--layers", "one"], "list of block numbers"),
    "device": (["--device", "abacus"], "--device 'abacus'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(made, here, name):
    options, message = MISTAKES[name]
    Path("empty.jsonl").write_text("")
    Path("blank.jsonl").write_text('{"text": " "}\n{"text": null}\n')
    for store in ("prep.zarr", "new.zarr"):
        line = refused(*covariance(made), *options, "--overwrite", "--store", store, store=store)
        assert re.search(message, line), line
    assert not Path("new.zarr").exists()


def test_models_that_cannot_be_loaded(made, here):
    model = Path(made.model)
    (here / "nothing").mkdir()
    for name in ("no-weights", "cut", "no-tokenizer", "incomplete"):
        shutil.copytree(model, name)
    Path("no-weights/model.safetensors").unlink()
    Path("cut/model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-100])
    for file in Path("no-tokenizer").glob("tokenizer*"):
        file.unlink()
    weights = load_file("incomplete/model.safetensors")
    del weights[f"{DOWN}.weight"]
    save_file(weights, "incomplete/model.safetensors", metadata={"format": "pt"})
    edited(model, here / "wider", hidden_size=64, head_dim=8)
    edited(model, here / "unknown", model_type="strange")
    edited(model, here / "wrong", hidden_size="wide")
    remote = {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"}
    edited(model, here / "remote", model_type="strange", auto_map=remote)
    for name, message in {
        "nothing": "cannot load the model .*nothing .*: check --model",
        "no-weights": "no file named model.safetensors",
        "cut": "cannot load the model .*cut .*: check --model",
        "no-tokenizer": "cannot load the tokenizer .*no-tokenizer ",
        "incomplete": rf"the checkpoint .*incomplete has no {DOWN}.weight of the shape .*: complete it",
        "wider": "the checkpoint .*wider has no model.layers.0.input_layernorm.weight of the shape .*: complete it",
        "unknown": "cannot load the model .*unknown .*`strange`",
        "wrong": "cannot load the model .*wrong .*hidden_size",
        "remote": "remote needs code from its own repository: pass --trust-remote-code if you trust it",
    }.items():
        line = refused(*covariance(made, "--overwrite", model=name))
        assert re.search(message, line), line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite(made, here, value):
    bad = with_weight(made, here / "bad", "model.layers.1.self_attn.o_proj", value)
    for options in (["--store", "new.zarr"], ["--overwrite"]):
        line = refused(*covariance(made, *options, model=bad))
        assert "the input of model.layers.1.mlp.gate_proj is NaN or infinite in batch 0: try --dtype float32" in line
    assert not Path("new.zarr").exists()


def test_errors_in_real_processes_are_one_line(made, tmp_path):
    """What other packages write to stderr on their own would show here, in one of them while they are imported, too."""
    bad = with_weight(made, tmp_path / "bad", "model.layers.1.self_attn.o_proj", float("nan"))
    wider = edited(made.model, tmp_path / "wider", hidden_size=64, head_dim=8)
    remote = edited(made.model, tmp_path / "remote", model_type="strange", auto_map={"AutoConfig": "strange.Config"})
    wanted = {
        "bad": (covariance(made, model=bad), "NaN or infinite in batch 0"),
        "wider": (covariance(made, model=wider), "of the shape that its config.json says"),
        "remote": (covariance(made, model=remote), "pass --trust-remote-code"),
        "hub": (covariance(made, model="nobody/nothing"), "cannot load the model nobody/nothing"),
    }
    for name, (arguments, said) in wanted.items():
        process = interpreter if name == "bad" else kills.command
        done = process(arguments, tmp_path, {"HF_HUB_OFFLINE": "1"})
        assert (done.returncode, done.stdout) == (2, "")
        err = done.stderr
        assert len(err.splitlines()) == 1 and err.startswith("Error: ") and said in err, err
    assert not (tmp_path / "prep.zarr").exists()


# Stores that do not fit


def test_another_run_is_refused_with_its_differences(made, here):
    line = refused(*covariance(made, "--seed", "1", "--moment", "diagonal", "--targets", "mlp"))
    for difference in (
        "corpus seed: 0 there, 1 asked for",
        "options moment: 'full' there, 'diagonal' asked for",
        "options targets: [] there, ['mlp'] asked for",
    ):
        assert difference in line
    assert line.endswith("name another --store, or replace it with --overwrite")
    other = tiny.save(tiny.model("GPT-2"), here / "gpt2")
    assert f"model id: '{made.model}' there, '{other}' asked for" in refused(*covariance(made, model=other))


def test_decompose_before_covariance(here):
    line = refused("decompose", "--store", "none.zarr", store="none.zarr")
    assert line == "Error: no store at none.zarr: run `prep covariance --model X --data Y` first"
    assert "run `prep covariance" in refused("info", "--store", "none.zarr", store="none.zarr")


def test_moments_that_cannot_serve(made, here):
    for kind, options, wish in [
        ("diagonal", [], "metric full"),
        ("diagonal", ["--for", "antipasto"], "select activation"),
        ("output", ["--for", "corda_kpm"], "metric full at power 1"),
        ("output", ["--for", "eva"], "metric components"),
    ]:
        line = refused("decompose", "--store", made.path / kind, *options, store=made.path / kind)
        command = "run `prep covariance --moment full` into another --store, or with --overwrite"
        assert line == (
            f"Error: model.layers.0.self_attn.q_proj: {wish} needs the full second moment, not {kind}: {command}"
        )


def test_a_model_of_other_shapes(made, here):
    other = tiny.save(tiny.llama(64), here / "wider")
    line = refused("decompose", "--name", "other", "--model", other)
    assert "model.layers.0.mlp.gate_proj is 64 x 32 in the model and 48 x 32 in the store: give the --model" in line


def test_another_basis_of_that_name(here):
    line = refused("decompose", "--rank", "8")
    assert "holds a basis 'full' with other options (rank: 4 there, 8 asked for): give this one another --name" in line


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_what_is_no_store_is_never_removed(made, here, options):
    Path("folder").mkdir()
    Path("folder/precious.txt").write_text("x")
    Path("file").write_text("x")
    zarr.open_group("other.zarr", mode="w", zarr_format=3).attrs["precious"] = 1
    for name in ("folder", "file", "other.zarr"):
        for command in (covariance(made), ["decompose"]):
            line = refused(*command, *options, "--store", name, store=name)
            assert f"{name} is " in line and "not a prep store: name another --store" in line
        with pytest.raises(StoreError, match="not a prep store"):
            create_store(name, {})
    assert Path("file").read_text() == "x"
    assert Path("folder/precious.txt").read_text() == "x"


def test_an_empty_directory_becomes_a_store(made, here):
    Path("empty.zarr").mkdir()
    assert invoke(*covariance(made, "--store", "empty.zarr")).exit_code == 0
    assert len(prep.open_store("empty.zarr").moments) == 14


def test_a_newer_format_is_refused(made, here):
    set_attributes("prep.zarr", format_version=99)
    for command in (["info"], ["decompose"], covariance(made), covariance(made, "--overwrite")):
        assert "has the format version 99, this prep-bases reads up to 2: upgrade prep-bases" in refused(*command)


# Disks


def test_too_little_room_is_seen_before_anything_is_written(made, here, monkeypatch):
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=100))
    line = refused(*covariance(made, "--store", "new.zarr"), store="new.zarr")
    assert "new.zarr needs 0.00 GB, 0.00 GB are free: make room" in line
    assert not Path("new.zarr").exists()
    refused(*covariance(made, "--moment", "diagonal", "--overwrite"))
    assert "free: make room" in refused("decompose", "--for", "pissa")


@pytest.mark.parametrize("free", [0, 8, 40, 100])
def test_a_disk_that_fills_up(made, disk, monkeypatch, free):
    """With `free` kB left a command ends in one line; when there is room again it does its work."""
    usage, store = shutil.disk_usage(disk), disk / "s.zarr"
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)

    def ends(*arguments):
        command = [*arguments, "--quiet", "--store", store]
        (disk / "filler").write_bytes(bytes(4096 * max(0, os.statvfs(disk).f_bavail - free // 4)))
        result = invoke(*command)
        assert isinstance(result.exception, SystemExit), repr(result.exception)
        assert (result.exit_code, result.stdout) == (2, "")
        assert re.fullmatch(rf"Error: the disk of {store} is full: make room and run .* again\n", result.stderr)
        (disk / "filler").unlink()
        result = invoke(*command)
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")

    ends(*covariance(made))
    moments = tiny.contents(store / "moments")
    assert moments == tiny.contents(made.path / "full" / "moments")
    ends("decompose", "--rank", "4")
    assert tiny.contents(store / "moments") == moments
    assert tiny.contents(store / "bases") == tiny.contents(made.path / "full" / "bases")


# Damage


def chunk(array):
    """A chunk file of an array directory."""
    return next(file for file in sorted(Path(array, "c").rglob("*")) if file.is_file())


def flip(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


DAMAGE = {"flipped": flip, "deleted": Path.unlink, "truncated": lambda file: file.write_bytes(file.read_bytes()[:-9])}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("array", ["second_moment", "mean"])
def test_damaged_moments_are_named(here, damage, array):
    row = prep.open_store("prep.zarr").moments[DOWN].places["second_moment"].row
    second_moment = Path("prep.zarr/moments/full-48/second_moment/c", f"{row}", "0", "0")
    DAMAGE[damage](second_moment if array == "second_moment" else chunk("prep.zarr/moments/full-48/mean"))
    moments = prep.open_store("prep.zarr").moments
    with pytest.raises(StoreError, match=rf"moments/full-48/{array} .*: restore the store from a copy"):
        getattr(moments[DOWN], array)
    other = "mean" if array == "second_moment" else "second_moment"
    assert torch.isfinite(getattr(moments[DOWN], other)).all()
    result = invoke("decompose", "--name", "again", "--rank", "4")
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert f"moments/full-48/{array} " in line
    with pytest.raises(StoreError, match="'again' is not complete"):
        _ = prep.open_store("prep.zarr").bases["again"]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("array", ["UP", "S", "spectrum"])
def test_damaged_bases_are_named(here, damage, array):
    DAMAGE[damage](chunk(f"prep.zarr/bases/full/32x48/{array}"))
    basis = prep.open_store("prep.zarr").bases["full"]
    with pytest.raises(StoreError, match=rf"bases/full/32x48/{array} .*: restore the store from a copy"):
        _ = basis["model.layers.0.mlp.down_proj"].spectrum
    assert basis["model.layers.0.mlp.up_proj"].record.rank == 4


def test_damaged_metadata_is_named(here):
    def read_both():
        store = prep.open_store("prep.zarr")
        return store.moments[DOWN].second_moment, store.bases["full"]

    for file, message in [
        ("moments/full-48/second_moment/zarr.json", "moments/full-48/second_moment is missing or its metadata is dam"),
        ("moments/zarr.json", "prep.zarr/moments is missing or damaged"),
        ("bases/full/zarr.json", "basis 'full' is missing or damaged"),
        ("zarr.json", "prep.zarr cannot be opened as a store"),
    ]:
        raw = Path("prep.zarr", file).read_bytes()
        for content in (raw[: len(raw) // 2], b""):
            Path("prep.zarr", file).write_bytes(content)
            with pytest.raises(StoreError, match=message):
                read_both()
        Path("prep.zarr", file).write_bytes(raw)


# Progress


def test_long_work_is_logged_line_by_line(made, here, monkeypatch):
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.0)
    lines = invoke(*covariance(made, "--store", "new.zarr")).stderr.splitlines()
    assert [line.split(" in ")[0] for line in lines] == [
        "covariance: 64 of 128 tokens",
        "covariance: 128 of 128 tokens",
    ]
    assert " tokens/s, " in lines[0] and lines[0].endswith(" s left")
    assert lines[-1].endswith(" tokens/s")


def test_a_terminal_sees_a_bar_with_rate_and_time_left(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress.Progress("covariance", 100, "tokens") as shown:
        shown.advance(40)
    assert "covariance:  40%" in screen.getvalue()
    assert "tokens/s]" in screen.getvalue()
    with progress.Progress("covariance", 100, "tokens") as shown:
        shown.step("block 2 of 4", 25, done=5)
        shown.advance(20)
    assert "covariance: block 2 of 4, 25 of 25 tokens:  20%" in screen.getvalue()
