"""Modules and batches of one's own, masks, encoder-decoders and experts: moments against float64 sums, and errors."""

import json
from collections import namedtuple

import numpy as np
import pytest
import tiny
import torch
from families import Routed, inputs, without
from torch import nn

import prep
from prep import PrepError, StoreError
from prep.store.info import info, table


class Net(nn.Module):
    """No blocks, no configuration, a dropout that calibration must not run, an attention without linear layers."""

    def __init__(self):
        super().__init__()
        self.embed, self.drop = nn.Embedding(20, 6), nn.Dropout(0.5)
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(6, 4, bias=False), nn.Linear(8, 3)
        self.scores, self.pooled = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 2)

    def forward(self, ids, scale=1.0):
        x = self.drop(self.embed(ids)) * scale
        self.pooled(x[:, 0])
        x = x + x @ self.scores
        return self.head(self.first(x).relu()) + self.second(x).sum()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


IDS = [torch.randint(1, 20, (3, 5), generator=torch.Generator().manual_seed(i)) for i in range(4)]
IDS[1][0, 3:] = 0  # padding


def real(ids):
    return ids != 0


def inputs_of(net, name, batches=IDS, mask=None):
    """The rows that a layer was given in evaluation mode, (n, d) in float64, for the real tokens."""
    rows = []
    handle = net.get_submodule(name).register_forward_pre_hook(lambda _m, args: rows.append(args[0].detach()))
    for ids in batches:
        net.eval()(ids)
    handle.remove()
    kept = [x if mask is None else x[mask(ids)] for x, ids in zip(rows, batches, strict=True)]
    return np.concatenate([x.reshape(-1, x.shape[-1]).double().numpy() for x in kept])


def gram(X):
    return X.T @ X / len(X)


FORMS = {
    "tensors": IDS,
    "tuples": [(ids, 1.0) for ids in IDS],
    "lists": [[ids] for ids in IDS],
    "dictionaries": [{"ids": ids, "scale": 1.0} for ids in IDS],
    "a loader": torch.utils.data.DataLoader(torch.cat(IDS), batch_size=3),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_batch(net, form, tmp_path):
    moments = prep.covariance(net, batches=FORMS[form], store=tmp_path / "s", quiet=True).moments
    assert list(moments.sites.values()) == [["pooled"], ["first", "second"], ["head"]]
    assert moments.skipped == {"scores": "a weight of Net, which is no linear layer"}
    for layer in moments:
        X = inputs_of(net, layer)
        assert moments[layer].count == len(X) == (12 if layer == "pooled" else 60)
        assert tiny.relative(moments[layer].second_moment, gram(X)) < 1e-6, layer


def test_a_mask_leaves_out_padding(net, tmp_path):
    """One row per sequence is no token of its own and is kept."""
    batches = [{"ids": ids} for ids in IDS]
    options = {"batches": batches, "mask": lambda batch: real(batch["ids"]), "quiet": True}
    store = prep.covariance(net, store=tmp_path / "s", moment="output", **options)
    for layer, count in (("first", 58), ("second", 58), ("head", 58), ("pooled", 12)):
        X = inputs_of(net, layer, mask=None if layer == "pooled" else real)
        moment = store.moments[layer]
        assert moment.count == len(X) == count
        assert tiny.relative(moment.mean, X.mean(0)) < 1e-6, layer
        assert tiny.relative(moment.output, gram(X @ tiny.weight(net.get_submodule(layer)).T)) < 1e-6, layer
    assert store.corpus["tokens"] == 58


def test_a_module_is_left_as_it_was(net, tmp_path):
    net.train()
    net.first.eval()
    before = {name: module.training for name, module in net.named_modules()}
    prep.covariance(net, batches=IDS, store=tmp_path / "s", quiet=True)
    assert {name: module.training for name, module in net.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_provenance(net, tmp_path):
    first = prep.covariance(net, batches=IDS, store=tmp_path / "a", quiet=True)
    assert first.model.items() >= {"id": None, "class": "Net", "dtype": "float32"}.items()
    assert first.corpus.items() >= {"source": "batches", "batches": 4, "tokens": 60}.items()
    assert json.dumps(first.options)
    again = prep.covariance(net, batches=(ids for ids in IDS), store=tmp_path / "b", quiet=True)
    other = prep.covariance(net, batches=IDS[::-1], store=tmp_path / "c", quiet=True)
    assert first.id == again.id != other.id
    lines = table(info(first))
    assert "model    a module (Net, float32)" in lines
    assert "corpus   4 batches, 60 tokens" in lines
    assert "skipped  scores: a weight of Net, which is no linear layer" in lines


def test_the_pipeline_of_a_module(net, tmp_path):
    store = tmp_path / "s"
    prep.covariance(net, batches=IDS, store=store, quiet=True)
    basis = prep.decompose(store, model=net, rank=3, quiet=True)
    assert set(basis) == {"first", "second", "head", "pooled"}
    X, W = inputs_of(net, "head"), tiny.weight(net.head)
    damped = gram(X) + 1e-3 * np.trace(gram(X)) / 8 * np.eye(8)
    wanted = np.linalg.svd(W @ np.linalg.cholesky(damped), compute_uv=False)
    assert np.allclose(basis["head"].S, wanted, rtol=1e-6)
    prep.attach(net, store, rank=2)
    net(IDS[0]).sum().backward()
    assert all(net.get_submodule(layer).core.g.grad.abs().sum() > 0 for layer in ("first", "second", "head"))
    prep.detach(net)
    assert prep.decompose(store, model=net, rank=3, quiet=True).hash == basis.hash
    with pytest.raises(StoreError, match=r"s was calibrated on a module, Net, which it cannot load: pass it in Python"):
        prep.decompose(store, rank=3, name="another", quiet=True)
    other = Net()
    other.head = nn.Linear(8, 5)
    with pytest.raises(PrepError, match="head is 5 x 8 in the model and 3 x 8 in the store"):
        prep.decompose(store, model=other, rank=3, name="another", quiet=True)


def test_a_plain_svd_of_a_module_needs_no_batches(net, tmp_path):
    basis = prep.decompose(tmp_path / "s", model=net, metric="identity", rank=2, quiet=True)
    assert np.allclose(basis["first"].S, np.linalg.svd(tiny.weight(net.first), compute_uv=False)[:2])
    prep.covariance(net, batches=IDS, store=tmp_path / "s", quiet=True)
    assert list(prep.open_store(tmp_path / "s").bases) == ["identity"]


def test_several_passes_need_batches_that_can_be_read_again(net, tmp_path):
    """8 x (36 + 6) bytes hold one site of width 6."""
    once = prep.covariance(net, batches=IDS, store=tmp_path / "a", quiet=True).moments
    options = {"memory_budget": "0.6kB", "quiet": True}
    store = prep.covariance(net, batches=IDS, store=tmp_path / "b", **options)
    assert store.corpus["batches"] == 4
    for layer in once:
        assert torch.equal(once[layer].second_moment, store.moments[layer].second_moment)
    with pytest.raises(PrepError, match="3 passes are needed"):
        prep.covariance(net, batches=iter(IDS), store=tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()


def test_moments_of_batches_are_replaced_only_when_asked(net, tmp_path):
    options = {"batches": IDS, "store": tmp_path / "s", "quiet": True}
    prep.covariance(net, **options)
    with pytest.raises(PrepError, match="cannot be compared"):
        prep.covariance(net, **options)
    assert prep.covariance(net, overwrite=True, **options).status == "complete"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "x.jsonl"}, "tokenizer"),
        ({"data": "x.jsonl", "batches": IDS}, "either data="),
        ({}, "either data="),
        ({"batches": []}, "is empty"),
        ({"batches": IDS, "dtype": "bfloat16"}, "dtype="),
        (
            {"batches": IDS, "mask": lambda batch: [1]},
            "attention_mask is list",
        ),
        (
            {"batches": [{"ids": IDS[0], "attention_mask": torch.ones(3, 1, 5, 5)}]},
            "has the shape",
        ),
        ({"batches": IDS, "mask": torch.zeros_like}, "no token reached first"),
        ({"batches": IDS, "targets": ["embed"]}, "Embedding"),
    ],
)
def test_what_cannot_be_calibrated_says_so(net, options, message, tmp_path):
    with pytest.raises(PrepError, match=message):
        prep.covariance(net, store=tmp_path / "s", quiet=True, **options)
    assert not (tmp_path / "s").exists()


def test_a_mask_belongs_to_batches(tmp_path):
    with pytest.raises(PrepError, match="mask="):
        prep.covariance("model", "x.jsonl", mask=real, store=tmp_path / "s")


# Encoder-decoders


LENGTHS = {"equal": ([1, 2, 3, 4], [4, 3, 2, 1]), "longer questions": ([5, 1, 9], [2, 4, 3])}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_each_side_of_an_encoder_decoder_has_its_mask(lengths, tmp_path):
    """The oracle reads every pair alone, without padding."""
    model, draw = tiny.model("T5"), torch.Generator().manual_seed(0)
    ids, answers = (torch.randint(3, 60, (len(sizes), max(sizes)), generator=draw) for sizes in lengths)
    mask, theirs = (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None] for sizes in lengths)
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    batch |= {"decoder_input_ids": answers, "decoder_attention_mask": theirs.long()}
    moments = prep.covariance(model, batches=[batch], store=tmp_path / "s", quiet=True).moments
    pairs = zip(ids, mask, answers, theirs, strict=True)
    singles = [{"input_ids": a[real][None], "decoder_input_ids": b[kept][None]} for a, real, b, kept in pairs]
    x = tiny.Activations(model, singles)
    for layer in moments:
        assert moments[layer].count == len(x[layer]), layer
        assert tiny.relative(moments[layer].second_moment, gram(x[layer])) < 1e-6, layer
    cross = [f"decoder.block.{i}.layer.1.EncDecAttention.{name}" for i in (0, 1) for name in "kv"]
    assert moments.sites[cross[0]] == cross


def test_without_masks_every_row_of_both_sides_counts(tmp_path):
    batch = {"input_ids": torch.ones(2, 7).long(), "decoder_input_ids": torch.ones(2, 3).long()}
    moments = prep.covariance(tiny.model("T5"), batches=[batch], store=tmp_path / "s", quiet=True).moments
    assert moments["encoder.block.0.layer.0.SelfAttention.q"].count == 14
    assert moments["decoder.block.0.layer.1.EncDecAttention.k"].count == 14
    assert moments["decoder.block.0.layer.1.EncDecAttention.q"].count == 6


def test_a_layer_that_is_called_again_is_seen_each_time_in_several_passes(tmp_path):
    class Again(nn.Sequential):
        def forward(self, x):
            return super().forward(super().forward(x))

    torch.manual_seed(0)
    net, options = Again(nn.Linear(8, 8), nn.Linear(8, 8)), {"batches": [torch.randn(5, 8)], "quiet": True}
    one = prep.covariance(net, store=tmp_path / "one", **options).moments
    several = prep.covariance(net, store=tmp_path / "several", memory_budget=1000, **options).moments
    for layer in one:
        assert one[layer].count == several[layer].count == 10
        assert torch.equal(one[layer].second_moment, several[layer].second_moment)


# Experts


def test_the_counts_of_experts_are_those_of_real_tokens(tmp_path):
    """Each real token is routed to two of four experts; the model routes and computes as before afterwards."""
    model, batches = tiny.model("Mixtral"), [without(batch, "labels") for batch in inputs("Mixtral", 4)]
    with torch.no_grad():
        before, implementation = model(**batches[0]).logits, model.config._experts_implementation
    assert implementation != "eager"
    moments = prep.covariance(model, batches=batches, store=tmp_path / "s", quiet=True).moments
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert tokens < sum(batch["attention_mask"].numel() for batch in batches)
    for projection in ("gate_up_proj", "down_proj"):
        counts = [moments[f"model.layers.1.mlp.experts.{e}.{projection}"].count for e in range(4)]
        assert sum(counts) == 2 * tokens
    assert model.config._experts_implementation == implementation
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, before)


@pytest.mark.parametrize("name", ["Mixtral", "GPT-OSS"])
def test_output_moments_and_bases_of_experts(name, tmp_path):
    model, batches = tiny.model(name), [without(batch, "labels") for batch in inputs(name, 4)]
    store = prep.covariance(model, batches=batches, store=tmp_path / "s", moment="output", quiet=True)
    singles = [without(batch, "attention_mask") for batch in (without(batch, "labels") for batch in inputs(name, 1))]
    routed = Routed(model, singles)
    basis = prep.decompose(store.location, model=model, rank=4, damping=0, quiet=True)
    for layer, W in expert_weights(model):
        Y = routed[layer] @ W.T
        assert tiny.relative(store.moments[layer].output, gram(Y)) < 1e-6, layer
        assert np.allclose(basis[layer].S, np.sqrt(np.linalg.eigvalsh(gram(Y))[::-1][:4]), rtol=1e-5), layer
        U, S, P = (value.double().numpy() for value in (basis[layer].U, basis[layer].S, basis[layer].P))
        assert tiny.relative(U.T @ W, S[:, None] * P) < 1e-5, layer


def expert_weights(model):
    for name, module in model.named_modules():
        for e in range(4) if name.endswith("mlp.experts") else ():
            for key in ("gate_up_proj", "down_proj"):
                W = getattr(module, key)[e].detach().double().numpy()
                yield f"{name}.{e}.{key}", W.T if module.is_transposed else W


def test_experts_in_several_passes(tmp_path):
    """A pass ends at its last site: with experts, when all experts of that module are done."""
    model, batches = tiny.model("Mixtral"), [without(batch, "labels") for batch in inputs("Mixtral", 4)]
    moments = {}
    for name, budget in (("one", 10**9), ("several", 20_000)):
        options = {"memory_budget": budget, "quiet": True}
        moments[name] = prep.covariance(model, batches=batches, store=tmp_path / name, **options).moments
    assert moments["one"].sites == moments["several"].sites
    for layer in moments["one"]:
        assert torch.equal(moments["one"][layer].second_moment, moments["several"][layer].second_moment), layer


def test_experts_without_tokens_are_skipped(tmp_path):
    """One token is routed to two of eight experts in each block."""
    model = tiny.model("Qwen3-MoE")
    batch = {"input_ids": torch.tensor([[5]])}
    moments = prep.covariance(model, batches=[batch], store=tmp_path / "s", targets=["experts"], quiet=True).moments
    assert len(moments) == 2 * 2 * 2
    assert len(moments.skipped) == 2 * 2 * 6
    assert set(moments.skipped.values()) == {"no token of the data was routed to it"}
    idle = next(iter(moments.skipped))
    with pytest.raises(StoreError, match=f"no moments of {idle}: no token of the data was routed to it"):
        _ = moments[idle]
    assert len(prep.decompose(tmp_path / "s", model=model, rank=2, quiet=True)) == 8


def test_adapters_refuse_experts_by_name(tmp_path):
    model, batches = tiny.model("Mixtral"), [without(batch, "labels") for batch in inputs("Mixtral", 12)]
    prep.covariance(model, batches=batches, store=tmp_path / "s", quiet=True)
    prep.decompose(tmp_path / "s", model=model, rank=2, quiet=True)
    with pytest.raises(PrepError, match="with the other experts of MixtralExperts: leave them out") as error:
        prep.attach(model, tmp_path / "s")
    layers = str(error.value).partition("layers=r'")[2].removesuffix("'")
    assert len(prep.attach(model, tmp_path / "s", layers=layers).layers) == 8


def test_targets_name_experts(tmp_path):
    model, batches = tiny.model("Mixtral"), [without(batch, "labels") for batch in inputs("Mixtral", 12)]
    options = {"batches": batches, "quiet": True}
    chosen = prep.covariance(model, targets=[r"experts\.1\.down_proj"], store=tmp_path / "a", **options).moments
    assert list(chosen) == [f"model.layers.{i}.mlp.experts.1.down_proj" for i in (0, 1)]
    rest = prep.covariance(model, exclude=["experts"], layers="0", store=tmp_path / "b", **options).moments
    assert list(rest) == [f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"]


class Lists(nn.Module):
    """Experts as plain linear layers that are handed some of the rows."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x, attention_mask=None):
        rows = x.reshape(-1, 6)
        return [expert(rows[i::2]) for i, expert in enumerate(self.experts)]


def test_padding_that_cannot_be_told_from_tokens_is_an_error(tmp_path):
    x, mask = torch.randn(3, 5, 6), torch.ones(3, 5)
    moments = prep.covariance(Lists(), batches=[(x, mask)], store=tmp_path / "a", quiet=True).moments
    assert [moments[f"experts.{i}"].count for i in (0, 1)] == [8, 7]
    mask[0, 1:] = 0
    batches = [{"x": x, "attention_mask": mask}]
    with pytest.raises(PrepError, match=r"the input of experts\.0 has 8 rows in batch 0 of 15 tokens, so its padding"):
        prep.covariance(Lists(), batches=batches, store=tmp_path / "b", quiet=True)


@pytest.mark.parametrize("name", ["a/b", "a\\b", "a\nb", "zarr.json", "up.partial", ".hidden", "x" * 300])
def test_names_that_a_store_cannot_keep_are_refused_before_the_pass(name, tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self._modules[name] = nn.Linear(4, 3)

        def forward(self, x):
            return self._modules[name](x)

    with pytest.raises(StoreError, match="cannot name a layer") as refused:
        prep.covariance(Named(), batches=[torch.ones(2, 4)], store=tmp_path / "s", quiet=True)
    assert len(str(refused.value).splitlines()) == 1 and list(tmp_path.iterdir()) == []


class InPlace(nn.Module):
    """A model that changes what it is given, the tensors of a nested batch too."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x, more=None):
        x += 1
        if more is not None:
            x = x + more["shift"].mul_(2)
        return self.second(self.first(x))


@pytest.mark.parametrize("nested", [False, True])
def test_a_model_that_changes_its_input_sees_every_batch_as_it_is(nested, tmp_path):
    """Neither the trial run, nor an earlier pass, nor the model's own habits show in the moments; the data stay."""
    torch.manual_seed(0)
    net, xs = InPlace(), [torch.randn(6, 4) for _ in range(3)]
    shift = torch.randn(4)
    batches = [(x, {"shift": shift}) if nested else x for x in xs]
    before = [x.clone() for x in xs]
    wanted = [(x + 1 + (2 * shift if nested else 0)).double().numpy() for x in xs]
    options = {"batches": batches, "quiet": True}
    store = prep.covariance(net, store=tmp_path / "s", memory_budget="0.16kB", **options)  # two passes
    assert tiny.relative(store.moments["first"].second_moment, gram(np.concatenate(wanted))) < 1e-6
    X = np.concatenate(wanted) @ tiny.weight(net.first).T + net.first.bias.detach().double().numpy()
    assert tiny.relative(store.moments["second"].second_moment, gram(X)) < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(xs, before, strict=True))


@pytest.mark.parametrize("scale", [1e-38, 1e-23, 1e-12, 1e12, 1e25, 1e33])
@pytest.mark.parametrize("moment", ["full", "diagonal", "output"])
def test_very_small_and_large_activations(scale, moment, tmp_path):
    """Their squares leave the range of float32; the moments, which are float64, do not."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 4, bias=False))
    batches = [scale * torch.randn(40, 8) for _ in range(3)]
    X = torch.cat(batches).double().numpy()
    batches[1:1] = [torch.zeros(5, 8)]
    store = prep.covariance(net, batches=batches, store=tmp_path / "s", moment=moment, quiet=True)
    stored, share = store.moments["0"], len(X) / (len(X) + 5)
    assert tiny.relative(stored.diagonal, share * np.diagonal(gram(X))) < 1e-6
    if moment == "full":
        assert tiny.relative(stored.second_moment, share * gram(X)) < 1e-6
    if moment == "output":
        assert tiny.relative(stored.output, share * gram(X @ tiny.weight(net[0]).T)) < 1e-5


class Doubling(nn.Module):
    """Changes a field of a named tuple, and reads one tensor by two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(6, 4)

    def forward(self, pair, again):
        pair.a.mul_(2)
        return self.first(pair.a).sum() + self.second(again).sum()


def test_copies_keep_named_tuples_and_what_is_one_tensor(tmp_path):
    Pair = namedtuple("Pair", ["a", "b"])
    parts = [torch.randn(5, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    given = [x.clone() for x in parts]
    batches = [{"pair": Pair(x, "text"), "again": x} for x in given]
    store = prep.covariance(Doubling(), batches=batches, store=tmp_path / "s", quiet=True)
    assert list(store.moments.sites.values()) == [["first", "second"]]
    X = 2 * torch.cat(parts).double().numpy()
    assert tiny.relative(store.moments["first"].second_moment, gram(X)) < 1e-6
    assert all(torch.equal(x, part) for x, part in zip(given, parts, strict=True))
