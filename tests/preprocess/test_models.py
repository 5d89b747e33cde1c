"""docs/models.md: families built from their configurations, their moments against float64 sums over unpadded text that
other hooks kept, and a training step of both kinds of adapter. PREP_WRITE_DOCS=1 writes the page anew.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import tiny
import torch
from families import FAMILIES, SENTENCES, Routed, inputs, without

import prep
from prep.store.info import skipped_lines

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
ATTENTION = r"^(?!.*\.experts\.)"


@dataclass(frozen=True)
class Row:
    """What the page says of a family after everything was checked."""

    cls: str
    layers: int
    sites: int
    experts: int
    skipped: list[str]


@cache
def row(name: str) -> Row:
    """Calibrate, compare, decompose and train; AssertionError where the family does not do what the page says."""
    with TemporaryDirectory() as folder:
        model, store = tiny.model(name), Path(folder) / "s"
        calibrate(name, model, folder, store)
        moments = prep.open_store(store).moments
        singles = [without(batch, "labels") for batch in inputs(name, 1)]
        if name != "T5":
            singles = [without(batch, "attention_mask") for batch in singles]
        plain, routed = tiny.Activations(model, singles), Routed(model, singles)
        for layer in moments:
            X, moment = (routed if ".experts." in layer else plain)[layer], moments[layer]
            assert moment.count == len(X), layer
            assert tiny.relative(moment.second_moment, X.T @ X / len(X)) < 1e-6, layer
            assert tiny.relative(moment.mean, X.mean(0)) < 1e-6, layer
        expected = {layer for layer, module in model.named_modules() if tiny.is_linear(module) and "." in layer}
        experts = [layer for layer in moments if ".experts." in layer]
        assert set(experts) == set(routed.kept)
        assert {layer for layer in expected if any(part.isdigit() for part in layer.split("."))} == {
            layer for layer in moments if layer not in experts
        }
        prep.decompose(store, model=model, rank=4, quiet=True)
        trains(name, tiny.model(name), store, with_prep)
        trains(name, tiny.model(name), store, with_peft)
        lines = skipped_lines(moments.skipped)
        return Row(type(model).__name__, len(moments) - len(experts), len(moments.sites), len(experts), lines)


def calibrate(name: str, model: Any, folder: str, store: Path) -> None:
    """Text by path and padded, as from the command line; what is no text, or has two sides, as batches."""
    if name in ("ViT", "T5"):
        prep.covariance(model, batches=[without(batch, "labels") for batch in inputs(name, 4)], store=store, quiet=True)
        return
    path = tiny.save(model, Path(folder) / "model", FAMILIES[name].side)
    data = tiny.write_data(Path(folder) / "text.jsonl", SENTENCES)
    prep.covariance(path, data, store=store, num_sequences=24, seq_len=16, batch_size=4, pack=False, quiet=True)


def with_prep(model: Any, store: Path) -> Any:
    prep.attach(model, store, rank=4, layers=ATTENTION)
    return model


def with_peft(model: Any, store: Path) -> Any:
    return prep.peft.get_model(model, store, init="whitened", r=4)


def trains(name: str, model: Any, store: Path, adapt: Callable[[Any, Path], Any]) -> None:
    """At its start the adapted model is the base model; one step lowers the loss and moves the adapters only."""
    [batch] = inputs(name, 24)
    with torch.no_grad():
        before = model(**batch).loss
    model = adapt(model, store)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    values = {key: p.detach().clone() for key, p in model.named_parameters()}
    loss = model(**batch).loss
    assert torch.allclose(loss, before, rtol=1e-5)
    loss.backward()
    torch.optim.Adam(trained.values(), lr=1e-3).step()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, values[key])}
    assert moved == set(trained)
    assert model(**batch).loss < loss


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name):
    assert row(name).sites > 0


HEAD = """# Models

Written by `PREP_WRITE_DOCS=1 pytest tests/preprocess/test_models.py`, which builds a model of two blocks of each family
from its configuration and, on every run, checks every row:

- the moments of all layers agree to 1e-6 with float64 sums over the activations of single, unpadded sentences, while
  the calibration reads them in padded batches: from a file, for T5 as pairs with a mask for each side;
- `prep.attach` and `prep.peft.get_model` start from the base model, and a training step lowers the loss.

"""

TAIL = """
`layers` are linear layers with moments, `sites` the inputs they read, `experts` projections of experts, each a site of
its own. Adapters of both kinds leave out experts, which have no module to wrap.

## Not calibrated

What lies in the blocks and is no linear layer, as `prep info` lists it:

{skipped}

The head, embeddings and convolutions are no targets; `--targets` may name the head.

## Experts

transformers keeps the experts of a block in one weight per projection. During calibration the model runs them one
after the other (`experts_implementation="eager"`), and each is a site of its own, such as
`model.layers.0.mlp.experts.3.gate_up_proj`, with the count of the real tokens that were routed to it: padding is not
routed at all. An expert that got no token is listed as skipped. This holds for every model whose experts transformers
can switch between implementations (`use_experts_implementation`), about sixty families.

Their bases are for analysis and compression. `prep.attach` refuses a basis with experts unless they are left out:

```python
prep.attach(model, "prep.zarr", layers=r"^(?!.*\\.experts\\.)")
```

Experts are many: `--memory-budget` cuts the calibration into passes, `--moment auto` keeps output moments where the
input is wide, `--exclude experts` leaves them out.

## Larger than one device

```
prep covariance --model M --data D --device-map auto
prep covariance --model M --data D --device-map auto --max-memory 0=20GB,cpu=60GB
prep covariance --model M --data D --device-map '{{"": "disk", "model.layers.0": 0}}'
```

`--device-map` spreads a model over devices, memory and disk with accelerate: `auto`, `balanced` or `sequential`, one
device, or a map (also a .json file) from modules to devices. The moments, sites and hashes are those of the model in
one place. Weights on disk stay in the checkpoint and are read in every forward pass: large batches and one pass
(`--batch-size`, `--memory-budget`) save time. Experts that the checkpoint holds one by one are written to a folder in
`TMPDIR` for the time of the run. Layers whose shared input is copied to another device have a site each.

## Larger than the memory

`prep covariance --block-by-block` ([scaling.md](scaling.md#models-larger-than-the-memory)) gives the same
store, bit for bit, for every family above but T5. Refused by name:
encoder-decoders, blocks that share more than hidden states (Gemma 3n), one block that is called again and again
(ALBERT).

## Encoder-decoders

Keys and values of the cross attention read the encoder's output and have its mask; the rest of the decoder has the
decoder's. Text is read by both sides; for pairs, give batches with `attention_mask` and `decoder_attention_mask`.

## Modules of one's own

```python
prep.covariance(model, batches=loader, store="prep.zarr")  # any nn.Module
prep.decompose("prep.zarr", model=model)
```

`batches` is any iterable of dictionaries (`model(**batch)`), tuples or lists (`model(*batch)`) or tensors
(`model(batch)`). A dictionary's `attention_mask` (B, T) leaves out padding; otherwise `mask=` is a function from a
batch to such a mask, or None. It applies to inputs with as many rows as the mask has elements; one row per sequence or
another stream, such as image patches, is taken whole. Without blocks, which are modules numbered in their names, every
linear layer is a target. The store names the class of the module and a hash of its shapes; it cannot load it, so
`decompose` must be given the module. A run on batches is not resumed. Where the memory budget asks for several passes,
the batches must be a list or a loader, not a generator.
"""


def page() -> str:
    """docs/models.md from the rows."""
    columns = ["family", "class", "layers", "sites", "experts", "skipped", "moments", "prep adapter", "PEFT adapter"]
    table = [columns, ["---"] * len(columns)]
    reasons = []
    for name in FAMILIES:
        checked = row(name)
        numbers = [str(checked.layers), str(checked.sites), str(checked.experts or ""), str(len(checked.skipped) or "")]
        table.append([name, f"`{checked.cls}`", *numbers, "< 1e-6", "ok", "ok"])
        reasons += [f"- {name}: {line}" for line in checked.skipped]
    rows = "".join(f"| {' | '.join(cells)} |\n" for cells in table)
    return HEAD + rows + TAIL.format(skipped="\n".join(reasons))


def test_the_page_is_current():
    """Stale: run PREP_WRITE_DOCS=1 pytest tests/preprocess/test_models.py."""
    if os.environ.get("PREP_WRITE_DOCS"):
        PAGE.write_text(page())
    assert PAGE.read_text() == page()
