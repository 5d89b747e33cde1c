"""save and load: bitwise round trips, and everything that must be refused by name."""

import json
import struct

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from workers import logits

import prep
from prep.adapters.cores import CORES, Core
from prep.store import open_store


def trained(store, seed=0, dtype=torch.float32, **arguments):
    model = tiny.llama(dtype=dtype)
    adapter = prep.attach(model, store, **arguments)
    torch.manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture
def saved(store, tmp_path):
    """A model with a dplr core and the file it was saved to."""
    model = trained(store, core="dplr", rank=8, k=2)
    prep.save(model, tmp_path / "adapter.safetensors")
    return model, tmp_path / "adapter.safetensors"


def refused(path, match=None, model=None, **arguments):
    """Loading is refused and leaves the model as it was."""
    model = model or tiny.llama()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(prep.PrepError, match=match) as caught:
        prep.load(model, path, **arguments)
    assert "\n" not in str(caught.value)
    assert before == {name: id(module) for name, module in model.named_modules()}
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("embed", [True, False])
@pytest.mark.parametrize("name", list(CORES))
def test_a_loaded_model_is_bitwise_the_saved_one(store, tmp_path, name, embed):
    model = trained(store, core=name, rank=20, layers="self_attn|up_proj")
    path = tmp_path / "adapter.safetensors"
    prep.save(model, path, embed_basis=embed)
    fresh = tiny.llama()
    adapter = prep.load(fresh, path, store=None if embed else store)
    assert torch.equal(logits(fresh), logits(model))
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {n for n, _ in adapter.named_parameters()}
    prep.merge(fresh)
    prep.detach(fresh)
    assert torch.equal(logits(fresh), logits(tiny.llama()))


def test_a_reference_is_smaller_than_a_basis(store, tmp_path):
    model = trained(store, core="gain")
    for embed in (True, False):
        prep.save(model, tmp_path / f"{embed}.safetensors", embed_basis=embed)
    assert (tmp_path / "False.safetensors").stat().st_size < 0.2 * (tmp_path / "True.safetensors").stat().st_size
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("embed", [True, False])
def test_half_precision_and_components_survive(store, tmp_path, embed):
    cases: list[dict] = [{"dtype": torch.bfloat16, "core": "rotation"}, {"basis": "eva"}]
    for number, arguments in enumerate(cases):
        model = trained(store, **arguments)
        prep.save(model, tmp_path / f"{number}.safetensors", embed_basis=embed)
        fresh = tiny.llama(dtype=model.dtype)
        prep.load(fresh, tmp_path / f"{number}.safetensors", store=None if embed else store)
        assert torch.equal(logits(fresh), logits(model))


def test_the_file_says_what_it_holds(saved, store):
    _, path = saved
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["prep"])
    record = open_store(store).bases["full"].layers["model.layers.0.self_attn.k_proj"]
    assert header["format_version"] == 1
    assert header["core"] == {"name": "dplr", "builtin": True, "options": {"k": 2, "suppress_only": False}}
    assert header["basis"]["store"] == open_store(store).id
    assert header["basis"]["hash"] == open_store(store).bases["full"].hash
    assert header["layers"]["model.layers.0.self_attn.k_proj"] == {
        "shape": [16, 32],
        "rank": 8,
        "weight_hash": record.weight_hash,
        "weight_dtype": "float32",
    }


class Shift(Core):
    """core(p) = s (p * S) * (tanh(w) + mark - mark);  mark is a buffer."""

    strength: float = 1.0

    def build(self, r):
        self.w = nn.Parameter(torch.zeros(r))
        self.register_buffer("mark", torch.rand(r))

    def forward(self, p):
        return self.s * p * self.S * torch.tanh(self.strength * self.w) * self.mark


class Other(Shift):
    pass


def test_a_core_of_ones_own_needs_its_class(store, tmp_path):
    model = trained(store, core=Shift(strength=2))
    path = tmp_path / "adapter.safetensors"
    prep.save(model, path)
    refused(path, "pass its class")
    refused(path, "not Other", core=Other)
    refused(path, "not Gain", core=CORES["gain"])
    fresh = tiny.llama()
    adapter = prep.load(fresh, path, core=Shift)
    assert torch.equal(logits(fresh), logits(model))
    assert next(iter(adapter.layers.values())).core.options == {"strength": 2.0}


def test_another_core_is_refused(saved):
    _, path = saved
    refused(path, "not Gain", core=CORES["gain"])
    prep.load(tiny.llama(), path, core=CORES["dplr"])


def test_a_class_that_has_changed_is_refused(store, tmp_path):
    prep.save(trained(store, core=Shift(strength=2)), tmp_path / "a.safetensors")

    def build(self, r):
        self.v = nn.Parameter(torch.zeros(r, 2))

    renamed = type("Shift", (Core,), {"build": build, "__annotations__": {"strength": float}, "strength": 1.0})
    refused(tmp_path / "a.safetensors", "takes .*'v'.* not .*'w'", core=renamed)
    narrow = type("Shift", (Core,), {"build": build})
    refused(tmp_path / "a.safetensors", "no option", core=narrow)


def test_another_base_model_is_refused(saved):
    _, path = saved
    refused(path, "other weights", model=tiny.llama(seed=1))
    prep.load(tiny.llama(seed=1), path, verify=False)
    prep.load(tiny.llama(dtype=torch.bfloat16), path)
    model = tiny.llama()
    model.model.layers[1].mlp.gate_proj = nn.Linear(32, 40)
    refused(path, "40 x 32", model=model)


def test_a_model_with_an_adapter_is_refused(saved):
    model, path = saved
    with pytest.raises(prep.PrepError, match="already"):
        prep.load(model, path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(saved, share):
    _, path = saved
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(path, "truncated")


@pytest.mark.parametrize("where", [0.3, 0.6, 0.9])
def test_an_altered_tensor_is_refused(saved, where):
    _, path = saved
    data = bytearray(path.read_bytes())
    (header,) = struct.unpack("<Q", data[:8])
    data[8 + header + int(where * (len(data) - 8 - header))] ^= 1
    path.write_bytes(data)
    refused(path, "altered")


def rewrite(path, change):
    """The file with its header changed by `change(header, tensors)`, the checksum left as it was."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["prep"])
    tensors = load_file(path)
    change(header, tensors)
    save_file(tensors, path, metadata={"prep": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, tensors: header.update(format_version=3), "format version 3"),
        (lambda header, tensors: header.pop("format_version"), "format_version"),
        (lambda header, tensors: header["core"]["options"].update(k=3), "altered"),
        (lambda header, tensors: header["layers"].popitem(), "altered"),
        (lambda header, tensors: tensors.popitem(), "altered"),
        (lambda header, tensors: tensors.update(extra=torch.ones(1)), "altered"),
    ],
)
def test_an_altered_header_or_a_newer_version_is_refused(saved, change, message):
    _, path = saved
    rewrite(path, change)
    refused(path, message)


def test_what_is_not_an_adapter_is_refused(saved, tmp_path):
    refused(tmp_path / "none.safetensors", "no adapter at")
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", r"not written by prep\.save")


def test_a_reference_is_checked_against_its_store(store, tmp_path):
    path = tmp_path / "adapter.safetensors"
    prep.save(trained(store), path, embed_basis=False)
    refused(path, "pass it")
    other = tiny.store(tmp_path / "other.zarr", tiny.llama())
    refused(path, "has the id", store=other)
    same = tiny.store(tmp_path / "prep.zarr", tiny.llama(), rank=12)
    refused(path, "another basis", store=same)
    bare = tiny.store(tmp_path / "bare" / "prep.zarr", tiny.llama(), ("identity",))
    refused(path, "no basis", store=bare)


def test_saving_needs_an_adapter_and_a_place(store, tmp_path):
    with pytest.raises(prep.PrepError, match="no adapter"):
        prep.save(tiny.llama(), tmp_path / "a.safetensors")
    with pytest.raises(prep.PrepError, match="cannot write"):
        prep.save(trained(store), tmp_path / "missing" / "a.safetensors")


# What a stranger may have written


def forge(path, change):
    """A file whose header and tensors `change` has altered, with a checksum that fits."""
    from prep.adapters.saved import _checksum

    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["prep"])
    tensors = load_file(path)
    header = change(header, tensors) or header
    if isinstance(header, dict):
        header["checksum"] = _checksum(header, tensors)
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, path, metadata={"format": "pt", "prep": text}
    )


LAYER = "model.layers.0.self_attn.q_proj"
FORGERIES = {
    "header is a list": lambda h, t: "[1]",
    "nested 100,000 deep": lambda h, t: "[" * 100_000 + "]" * 100_000,
    "no core": lambda h, t: h.pop("core") and h,
    "core is a number": lambda h, t: h.update(core=7),
    "core's name is a list": lambda h, t: h["core"].update(name=["gain"]),
    "options are a list": lambda h, t: h["core"].update(options=[1]),
    "an option of another type": lambda h, t: h["core"]["options"].update(k="many"),
    "no basis": lambda h, t: h.pop("basis") and h,
    "metric is a number": lambda h, t: h["basis"].update(metric=3),
    "layers are a list": lambda h, t: h.update(layers=[LAYER]),
    "a layer is a number": lambda h, t: h["layers"].update({LAYER: 7}),
    "shape is text": lambda h, t: h["layers"][LAYER].update(shape="32x32"),
    "shape of three": lambda h, t: h["layers"][LAYER]["shape"].append(1),
    "rank is text": lambda h, t: h["layers"][LAYER].update(rank="8"),
    "rank is too large": lambda h, t: h["layers"][LAYER].update(rank=10**6),
    "rank 0": lambda h, t: h["layers"][LAYER].update(rank=0),
    "embedded is text": lambda h, t: h.update(embedded="yes"),
    "version is text": lambda h, t: h.update(format_version="1"),
    "hash with a newline": lambda h, t: h["layers"][LAYER].update(weight_hash="a\nb"),
    "no U": lambda h, t: t.pop(f"{LAYER}.U") is None,
    "U of another shape": lambda h, t: t.update({f"{LAYER}.U": torch.zeros(3, 3)}),
    "P transposed": lambda h, t: t.update({f"{LAYER}.P": t[f"{LAYER}.P"].T.contiguous()}),
    "P of integers": lambda h, t: t.update({f"{LAYER}.P": t[f"{LAYER}.P"].int()}),
    "S of another rank": lambda h, t: t.update({f"{LAYER}.S": torch.ones(5)}),
    "NaN in U": lambda h, t: t[f"{LAYER}.U"].fill_(float("nan")) is None,
    "no core parameter": lambda h, t: t.pop(f"{LAYER}.core.g") is None,
    "a core parameter of another shape": lambda h, t: t.update({f"{LAYER}.core.g": torch.zeros(3)}),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_file_is_refused_in_one_line(saved, name):
    _, path = saved
    change = FORGERIES[name]
    forge(path, lambda header, tensors: result if isinstance(result := change(header, tensors), (str, dict)) else None)
    refused(path)


def test_a_reference_survives_moments_that_are_added_to_its_store(store, tmp_path):
    """The basis' own hash is what counts: the id of a store of bases changes when it is calibrated."""
    import shutil

    from prep.store.format.schema import put_attributes

    model = trained(store, core="gain", rank=8)
    prep.save(model, tmp_path / "a.safetensors", embed_basis=False)
    copy = shutil.copytree(store, tmp_path / "s")
    root = open_store(copy, "r+").root
    put_attributes(root, {**root.attrs, "id": "f" * 32})
    fresh = tiny.llama()
    prep.load(fresh, tmp_path / "a.safetensors", store=copy)
    assert torch.equal(logits(fresh), logits(model))
