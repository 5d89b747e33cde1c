"""What the figures and tables of a report are made of, against NumPy on what the store and the model hold."""

import numpy as np
import pytest
import tiny
import torch
from pages import Page

import prep
from prep.store import SiteData, create_store, open_store
from prep.store.format.schema import panels

EXPONENT = 0.8
KINDS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
BASES = ["full", "diagonal", "identity", "eva"]


def layer(kind, block):
    return f"model.layers.{block}.{kind}"


@pytest.fixture(scope="module")
def kept(made):
    """(basis, layer) -> the share that the first 1 .. r directions keep, of E||W x||^2 or of the input variance."""
    store, modules, found = open_store(made.store), tiny.layers(made.net), {}
    for name in BASES:
        for one, basis in store.bases[name].read().items():
            moment, W = store.moments[one], tiny.weight(modules[one])
            C, mean = moment.second_moment.numpy(), moment.mean.numpy()
            U, P = basis.U.double().numpy(), basis.P.double().numpy()
            if name == "eva":
                centred = C - np.outer(mean, mean)
                shares = np.einsum("ri,ij,rj->r", P, centred, P) / np.trace(centred)
            else:
                output = W @ C @ W.T
                shares = np.einsum("ir,ij,jr->r", U, output, U) / np.trace(output)
            found[name, one] = np.cumsum(shares)
    return found


def test_the_heat_map_shows_kept_output_at_the_rank_of_the_slider(made, kept):
    figure = made.page.figure("kept")
    slider, [menu] = figure.layout["sliders"][0], figure.layout["updatemenus"]
    assert [step["label"] for step in slider["steps"]] == ["1", "2", "4", "8", "16"]
    assert [button["label"] for button in menu["buttons"]] == [*BASES[:3], "eva, of the input"]
    for trace in figure.data:
        assert (trace["x"], trace["y"]) == (["0", "1"], KINDS)
    assert figure.data[0]["z"] == slider["steps"][slider["active"]]["args"][0]["z"][0]
    for step in slider["steps"]:
        for i, name in enumerate(BASES):
            wanted = np.array([[kept[name, layer(kind, block)] for block in (0, 1)] for kind in KINDS])
            share = wanted[:, :, int(step["label"]) - 1]
            z, texts = (np.array(step["args"][0][key][i]) for key in ("z", "text"))
            np.testing.assert_allclose(z.astype(float), -np.log10(np.maximum(1 - share, 1e-3)), atol=2e-3)
            assert texts.tolist() == [[f"{100 * value:.2f} % kept" for value in row] for row in share]
    for i, button in enumerate(menu["buttons"]):
        assert button["args"] == [{"visible": [i == j for j in range(len(BASES))]}]


def test_spectra_are_medians_and_ranges_of_kinds(made):
    figure, store = made.page.figure("spectra"), open_store(made.store)
    traces = iter(figure.data)
    for name in BASES:
        bases = store.bases[name].read()
        for kind in KINDS:
            spectra = np.array([bases[layer(kind, block)].spectrum.numpy() for block in (0, 1)])
            spectra /= spectra[:, :1]
            low, high, middle = next(traces), next(traces), next(traces)
            places = np.array(middle["x"]) - 1
            assert places[0] == 0 and places[-1] == spectra.shape[1] - 1
            for trace, wanted in ((low, spectra.min(0)), (high, spectra.max(0)), (middle, np.median(spectra, axis=0))):
                np.testing.assert_allclose(trace["y"], wanted[places], rtol=1e-3)
            assert middle.get("visible", True) == (name == "full")
    assert next(traces, None) is None
    titles = [note["text"] for note in figure.layout["annotations"]]
    assert titles[: len(KINDS)] == KINDS


def test_the_excess_falls_as_tokens_to_the_minus_08(made):
    figure, store = made.page.figure("data"), open_store(made.store)
    names = [button["label"] for button in figure.layout["updatemenus"][0]["buttons"]]
    assert names == ["full", "diagonal", "eva, of the input"]  # plain SVD does not depend on the tokens
    traces = iter(figure.data)
    for name in ("full", "diagonal", "eva"):
        records = [record.crossed for record in store.bases[name].layers.values() if record.crossed]
        assert len(records) == len(KINDS) * 2
        for i, rank in enumerate((8, 16)):
            shares = [one["excess"][i] / one["least"][i] for one in records if one["least"][i] > 1e-9]
            trace = next(traces)
            assert trace["name"] == f"rank {rank}" and trace["x"] == [128, 256, 512, 1024]
            wanted = [np.median(shares) * more**-EXPONENT for more in (1, 2, 4, 8)]
            np.testing.assert_allclose(trace["y"], wanted, rtol=1e-3)
    assert next(traces, None) is None


def test_bases_side_by_side_are_means_over_layers(made, kept):
    figure = made.page.figure("bases")
    traces = iter(figure.data)
    for name in BASES:
        for kind in ("all", *KINDS):
            layers = [layer(one, block) for one in KINDS for block in (0, 1) if kind in ("all", one)]
            lost = 1 - np.mean([kept[name, one] for one in layers], axis=0)
            trace = next(traces)
            assert trace["x"] == [1, 2, 4, 8, 16]
            wanted = np.maximum(lost[np.array(trace["x"]) - 1], 1e-4)
            np.testing.assert_allclose(trace["y"], wanted, rtol=1e-3, atol=1e-6)
    assert next(traces, None) is None


def test_budgets_are_those_of_equal_ranks_and_give_more(made, kept):
    """What the ranks of the map keep, of unseen tokens if that is known, is what the line says; they cost no more."""
    lines, ranks = made.page.figure("budget").data, made.page.figure("budget-2")
    modules, bases = tiny.layers(made.net), open_store(made.store).bases
    places = [(kind, block) for kind in KINDS for block in (0, 1)]
    cost = {place: sum(tiny.weight(modules[layer(*place)]).shape) for place in places}
    steps = ranks.layout["sliders"][0]["steps"]
    assert [step["label"] for step in steps] == ["1", "2", "4", "8", "16"]
    for i, name in enumerate(BASES[:3]):
        ours, equal = lines[2 * i : 2 * i + 2]
        sums = {place: kept[name, layer(*place)] for place in places}
        if name != "identity":
            sums = {place: np.cumsum(bases[name].unseen(layer(*place)).numpy()) for place in places}
        assert (ours["name"], equal["name"]) == (name, f"{name}, equal ranks")
        for number, step in enumerate(steps):
            chosen = {
                (kind, block): int(step["args"][0]["text"][i][row][block].removeprefix("rank "))
                for row, kind in enumerate(KINDS)
                for block in (0, 1)
            }
            budget = sum(int(step["label"]) * price for price in cost.values())
            spent = sum(rank * cost[place] for place, rank in chosen.items())
            assert spent <= budget == ours["x"][number] == equal["x"][number]
            lost = 1 - np.mean([sums[place][rank - 1] for place, rank in chosen.items()])
            same = 1 - np.mean([sums[place][int(step["label"]) - 1] for place in places])
            np.testing.assert_allclose(ours["y"][number], max(lost, 1e-4), rtol=1e-3)
            np.testing.assert_allclose(equal["y"][number], max(same, 1e-4), rtol=1e-3)
            assert lost <= same + 1e-12


def test_the_tables_say_what_was_made_of_what(made):
    facts, store = prep.info(made.store), open_store(made.store)
    origin, bases = made.page.tables["made"]
    said = dict(origin)
    assert said["model"].startswith(made.given.model) and "LlamaForCausalLM in float32" in said["model"]
    assert said["corpus"] == f"{made.given.data}, train: 8 x 16, packed, 128 tokens"
    assert said["weights"] == store.model["weights"] and said["corpus hash"] == store.corpus["hash"]
    assert said["calibrated"].startswith(facts["run"]["started"]) and prep.__version__ in said["calibrated"]
    assert said["moments"] == "14 layers, 8 inputs (8 full)" and store.id in said["store"]
    for row, name in zip(bases[1:], BASES, strict=True):
        basis = facts["bases"][name]
        assert row[0] == name and row[-1] == basis["hash"][:12] and f"{basis['energy']:.3f}" in row
    assert facts["advice"] in made.page.sections[""]


def test_bases_are_shown_without_reading_u_and_p(made, tmp_path):
    """Other bytes in their place change nothing."""
    for name in BASES:
        for chunk in (made.store / "bases" / name).glob("*/UP/c/*/*/*"):
            raw = chunk.read_bytes()
            chunk.write_bytes(bytes(len(raw)))
            made.page.undo = [*getattr(made.page, "undo", []), (chunk, raw)]
    try:
        again = Page(prep.report(made.store, tmp_path / "again.html"))
        assert again.text == made.page.text
    finally:
        for chunk, raw in made.page.undo:
            chunk.write_bytes(raw)


def test_experts_are_shown_with_the_tokens_routed_to_them(tmp_path):
    net = tiny.model("Qwen3-MoE")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter[3] = -100 * parameter[:3].abs().sum(0)
    given = tiny.sources(tmp_path, net)
    prep.covariance(given.model, given.data, store=tmp_path / "s", **tiny.RUN)
    page = Page(prep.report(tmp_path / "s", tmp_path / "r.html"))
    moments, [trace] = open_store(tmp_path / "s").moments, page.figure("experts").data
    assert trace["x"] == ["0", "1"] and trace["y"] == [str(e) for e in range(8)]
    for e in range(8):
        for block in (0, 1):
            name = f"model.layers.{block}.mlp.experts.{e}.gate_up_proj"
            count = moments[name].count if name in moments else 0
            assert trace["text"][e][block] == f"{count:,} tokens"
            assert trace["z"][e][block] == (pytest.approx(np.log10(count), abs=2e-3) if count else None)


def test_dense_models_have_no_section_on_experts(made):
    assert list(made.page.sections) == ["", "made", "kept", "spectra", "data", "bases", "budget", "standing"]


def test_inputs_that_stand_out_are_named_with_why(tmp_path):
    """One site with a dead and a loud channel, one whose mean is nearly all, one with few tokens, one as usual."""
    rng = np.random.default_rng(0)

    def site(name, X):
        C = X.T @ X / len(X)
        member = {"shape": [8, X.shape[1]], "weight_hash": "0" * 32, "weight_dtype": "float32"}
        parts = [torch.from_numpy(C[a:b, :b].copy()) for a, b in panels(len(C))]
        return SiteData("full", {name: member}, len(X), torch.from_numpy(X.mean(0)), second_moment=parts)

    usual, loud, constant = (rng.standard_normal((100, 20)) for _ in range(3))
    loud[:, 3], loud[:, 7] = 0, 100 * loud[:, 7]
    constant += 5
    inputs = {"usual": usual, "loud": loud, "constant": constant, "few": usual[:10]}
    sites = {f"model.layers.0.{name}": site(f"model.layers.0.{name}", X) for name, X in inputs.items()}
    attrs = {"id": "0", "model": {"id": "m"}, "corpus": {"tokens": 100}, "options": {}, "status": "complete"}
    tiny.write_moments(create_store(tmp_path / "s", attrs).root, sites)
    page = Page(prep.report(tmp_path / "s", tmp_path / "r.html"))
    few, dead, outlier, mean = page.tables["standing"]
    median = np.median((loud**2).mean(0))
    share = 100 * (constant.mean(0) ** 2).sum() / (constant**2).mean(0).sum()
    assert few[1:] == [["model.layers.0.few", "10", "20"]]
    assert dead[1:] == [["model.layers.0.loud", "1", "20"]]
    assert outlier[1:] == [["model.layers.0.loud", "1", f"{(loud**2).mean(0).max() / median:,.0f}"]]
    assert mean[1:] == [["model.layers.0.constant", f"{share:.0f} %"]]
    assert "model.layers.0.usual" not in page.sections["standing"]
    for title in ("Fewer tokens than the input is wide", "Dead input", "Outlier channels", "Large means"):
        assert f"{title}" in page.sections["standing"]


def test_layers_that_are_ill_conditioned_are_named_with_their_numerical_rank(tmp_path):
    net = tiny.llama()
    q, down = net.model.layers[0].self_attn.q_proj, net.model.layers[1].mlp.down_proj
    with torch.no_grad():
        q.weight[5:] = q.weight[:1]
        down.weight[25:] = down.weight[:1]
    model = tiny.save(net, tmp_path / "model")
    prep.decompose(tmp_path / "s", for_="pissa", model=model, rank=16, quiet=True)
    page = Page(prep.report(tmp_path / "s", tmp_path / "r.html"))
    ill, below = page.tables["standing"]
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    ranks = [np.linalg.matrix_rank(tiny.weight(module)) for module in (q, down)]
    assert ranks == [5, 25]
    assert ill[1:] == [[name, str(rank), "32", "identity"] for name, rank in zip(names, ranks, strict=True)]
    assert below[1:] == [[names[0], "16", "5", "identity"]]


def test_repairs_and_samples_are_said_to_be_what_they_are(tmp_path):
    """A repair keeps of the error; a sample is counted; directions chosen by it are not compared between halves."""
    given = tiny.sources(tmp_path, tiny.llama())
    store, report = tmp_path / "prep.zarr", tmp_path / "report.html"
    prep.covariance(given.model, given.data, store=store, keep_tokens=32, **tiny.RUN)
    prep.decompose(store, rank=16, select="activation", pooling="mean_abs", quiet=True)
    prep.report(store, report)
    page = Page(report)
    assert "32 tokens of each kept" in page.sections["made"]
    assert "are not compared between the halves" in page.sections["data"]
    prep.decompose(store, rank=16, repair="int4", quiet=True)
    prep.report(store, report)
    page = Page(report)
    assert "repair-int4, of the error" in [b["label"] for b in page.figure("kept").layout["updatemenus"][0]["buttons"]]
    assert "of the error W - Q" in page.sections["kept"]
