"""What a calibration reads: text through a tokenizer, or the caller's own batches for any module.

Both give numbered batches, the masks of a batch, a forward that takes it, and what a store says of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import asdict, fields
from functools import partial
from itertools import chain
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from ...errors import PrepError
from ..hub import absolute_if_local
from ..model.experts import watched
from ..model.forward import Forward, Inputs, text_forward
from ..model.loading import load_config, load_tokenizer
from ..model.placement import input_device
from ..model.sites import DECODER_MASK, LABELS, MASK
from ..numerics.sample import Key
from ..options import CovarianceOptions
from .mixture import load_mixture
from .text import Corpus, CorpusOptions, load_corpus

_LABELLED = ("label_mask", "answer_from")  # said of a corpus only where they are given
_SHARED = [field.name for field in fields(CorpusOptions) if field.name != "source"]
PROBE_TOKENS = 32  # length of the sequence on which shared inputs are found
Mask = Callable[[Any], Tensor | None]


class Text:
    """A corpus in batches of `batch_size` sequences, from sequence number `first` on, for a transformers model.

    total, sequences, count: tokens that are read, sequences and batches from there on; half: how many batches are in
    when half of the whole corpus is. tokens: of the whole corpus, those that count. seed: of its samples, from the
    first sequence, so that a corpus that grows keeps it.
    """

    unit = "tokens"
    once = False
    resumable = True

    def __init__(self, corpus: Corpus, batch_size: int, first: int = 0):
        self.corpus, self.batch_size, self.first = corpus, batch_size, first
        self.options = {"batch_size": batch_size}
        self.total = sum(map(len, corpus.sequences[first:]))
        self.tokens, self.seed = corpus.tokens, _seed(corpus.hash_of(1))
        size = max(batch_size, 1)  # `batches` refuses a smaller one
        self.sequences = len(corpus.sequences) - first
        self.count = -(-self.sequences // size)
        middle = -(-len(corpus.sequences) // size) // 2 * size
        self.half = max(0, middle - first) // size
        asked = {name: value for name, value in asdict(corpus.options).items() if name not in _LABELLED or value}
        self.about: dict[str, Any] = {**asked, "tokens": corpus.tokens, "hash": corpus.hash}
        if corpus.labels:
            self.about["tokens_read"] = corpus.read
        if corpus.mixture:
            self.about["mixture"] = list(corpus.mixture)

    def after(self, first: int) -> Text:
        """The same corpus from sequence number `first` on."""
        return Text(self.corpus, self.batch_size, first)

    def forward(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> Forward:
        """Runs the part of the model that holds `layers`."""
        return text_forward(model, layers)

    def example(self) -> Inputs:
        """The beginning of the first sequence."""
        return {name: value[:, :PROBE_TOKENS] for name, value in next(self.corpus.batches(1)).items()}

    def read(self, first: int = 0) -> Iterator[Inputs]:
        """Batches from number `first` on."""
        return self.corpus.batches(self.batch_size, self.first + first * self.batch_size)

    def masks(self, batch: Inputs) -> Mapping[str, Tensor]:
        """The masks of a batch by name, which an encoder-decoder reads on both sides; none without padding."""
        return dict.fromkeys((MASK, DECODER_MASK), batch[MASK]) if MASK in batch else {}

    def labels(self, batch: Inputs) -> Tensor | None:
        """The tokens of a batch that count (B, T), 1 or 0; None where all real ones do."""
        return batch.get(LABELS)

    def keys(self, number: int) -> list[Key]:
        """What the tokens of each sequence of a batch are drawn by."""
        first = self.first + number * self.batch_size
        return [(self.seed, i) for i in range(first, min(first + self.batch_size, len(self.corpus.sequences)))]

    def end(self, number: int) -> int:
        """`number`, or the number of batches where there are fewer."""
        return min(number, self.count)

    def size(self, first: int, last: int) -> int:
        """Tokens of the batches from number `first` to before `last`."""
        a, b = (self.first + number * self.batch_size for number in (first, last))
        return sum(map(len, self.corpus.sequences[a:b]))


class Batches:
    """The caller's own batches: dictionaries, tuples or tensors, which the module is called with.

    mask: batch -> (B, T), zero on padding, or None; by default the `attention_mask` of a dictionary. Inputs of other
    leading sizes are not masked. once: they cannot be read again. count: how many there are, 0 where that is not known;
    half: half of them. tokens: not known. seed: of samples, from the first one. `about` is complete when all have been
    read.
    """

    unit = "batches"
    resumable = False
    tokens = None

    def __init__(self, batches: Iterable[Any], mask: Mask | None = None):
        self._mask = mask
        self.options: dict[str, Any] = {}
        iterator = iter(batches)
        self.once = iterator is batches
        self._first: Any = next(iterator, None)
        if self._first is None:
            raise PrepError("batches= is empty: give at least one batch")
        self._batches = chain([self._first], iterator) if self.once else batches
        self.total = self.count = len(batches) if isinstance(batches, Sized) else 0
        self.half = self.count // 2
        self.about: dict[str, Any] = {"source": "batches"}
        digest = xxhash.xxh3_128()
        _hash(digest, self._first)
        self.seed = _seed(digest.hexdigest())
        self.masks(self._first)

    def after(self, first: int) -> Batches:
        """All batches: their runs begin with the first."""
        assert not first
        return self

    def forward(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> Forward:
        """Calls the model with a copy of a batch on the model's device."""
        return watched(partial(_call, model, input_device(model)), layers)

    def example(self) -> Inputs:
        """The first batch."""
        return self._first

    def read(self, first: int = 0) -> Iterator[Inputs]:
        """The batches, which are counted and hashed as they come."""
        digest, count = xxhash.xxh3_128(), 0
        for batch in self._batches:
            _hash(digest, batch)
            count += 1
            yield batch
        self.about |= {"batches": count, "hash": digest.hexdigest()}

    def masks(self, batch: Inputs) -> Mapping[str, Tensor]:
        """The masks of a batch by name."""
        given = batch if isinstance(batch, Mapping) else {}
        masks = {name: given[name] for name in (MASK, DECODER_MASK) if given.get(name) is not None}
        if self._mask is not None:
            masks.pop(MASK, None)
            own = self._mask(batch)
            masks |= {} if own is None else {MASK: own}
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                what = f"has the shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"is {type(mask).__name__}"
                raise PrepError(f"the {name} {what}: give mask=, a function from a batch to (B, T)")
        return masks

    def labels(self, batch: Inputs) -> Tensor | None:
        """None: `mask` says which tokens count."""
        return None

    def keys(self, number: int) -> list[Key]:
        """What the tokens of a batch are drawn by."""
        return [(self.seed, number)]

    def end(self, number: int) -> int:
        """`number`: how many batches there are may not be known."""
        return number

    def size(self, first: int, last: int) -> int:
        """The number of batches: their tokens are not known before they are read."""
        return last - first


def _call(model: nn.Module, device: torch.device, batch: Inputs) -> object:
    own = _copied(batch, device)
    if isinstance(own, Mapping):
        return model(**own)
    return model(*own) if isinstance(own, (tuple, list)) else model(own)


def _copied(value: Any, device: torch.device, made: dict[int, Tensor] | None = None) -> Any:
    """A batch on a device, its tensors copied: a model may change its input, which is read again.

    made: copies by the id of their original, so that a tensor that appears twice in a batch is copied once.
    """
    made = {} if made is None else made
    if isinstance(value, Tensor):
        if id(value) not in made:
            made[id(value)] = value.detach().to(device, copy=True)
        return made[id(value)]
    if isinstance(value, Mapping):
        return {name: _copied(item, device, made) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_copied(item, device, made) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)  # fields: of a named tuple
    return value


Source = Text | Batches


def open_source(options: CovarianceOptions) -> Source:
    """What the options name: text, read and tokenised, or batches. PrepError for whatever is wrong with it."""
    if options.batches is not None:
        return Batches(options.batches, options.mask)
    name = absolute_if_local(str(options.model))
    load_config(name, options.revision, options.trust_remote_code)  # where there is no model, that is what is wrong
    tokenizer = load_tokenizer(name, options.revision, options.trust_remote_code)
    parts = [(absolute_if_local(source), weight) for source, weight in options.sources]
    corpus = CorpusOptions(source=parts[0][0], **{name: getattr(options, name) for name in _SHARED})
    if len(parts) > 1:
        return Text(load_mixture(corpus, parts, tokenizer), options.batch_size)
    return Text(load_corpus(corpus, tokenizer), options.batch_size)


def _seed(hash_: str) -> int:
    """The first 64 bits of a hash."""
    return int(hash_[:16], 16)


def _hash(digest: Any, value: Any) -> None:
    """Feed names, shapes, dtypes and contents of a batch into the digest."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            digest.update(str(name).encode())
            _hash(digest, item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _hash(digest, item)
    else:
        plain = isinstance(value, (str, int, float, bool)) or value is None
        digest.update((repr(value) if plain else type(value).__name__).encode())
