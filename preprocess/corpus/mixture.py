"""A mixture of sources: sequences in proportion to their weights, each cut from one source as if it were alone.

With weights w_i that sum to W, source i gives n w_i / W of n sequences, rounded by largest remainders. The order within
a source follows from the seed; the sources take turns such that any beginning of the mixture is in proportion, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

from ...errors import PrepError
from .text import Corpus, CorpusOptions, check_options, load_corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Weighted = Sequence[tuple[str, int]]  # sources with their weights


def load_mixture(options: CorpusOptions, parts: Weighted, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """`num_sequences` sequences of all parts; the options of text are of every one. The source of `options` is ignored.

    Raises PrepError for a part that would give no sequence, and as `load_corpus` does.
    """
    parts = sorted(parts)  # the order in which they are named makes no difference
    check_options(options, tokenizer)
    twice = [source for source, _ in parts if [name for name, _ in parts].count(source) > 1]
    if twice:
        raise PrepError(f"{twice[0]} is named twice in --data: give it one weight, as in {twice[0]}=2")
    weights = [weight for _, weight in parts]
    counts = allotted(options.num_sequences, weights)
    corpora = []
    for (source, weight), count in zip(parts, counts, strict=True):
        share = Fraction(weight, sum(weights))
        if not count:
            raise PrepError(
                f"{options.num_sequences} sequences leave none for {source} with {weight} of {sum(weights)} parts: "
                f"ask for --num-sequences {-(-1 // share)}, or weigh it more"
            )
        corpora.append(load_corpus(replace(options, source=source, num_sequences=count), tokenizer, share))
    mixture = tuple(
        {"source": source, "weight": weight, "sequences": count, "tokens": corpus.tokens}
        for (source, weight), count, corpus in zip(parts, counts, corpora, strict=True)
    )
    name = " + ".join(f"{weight} x {source}" for source, weight in parts)
    turns = _turns([len(corpus.sequences) for corpus in corpora])
    sequences = tuple(corpora[i].sequences[j] for i, j in turns)
    labels = tuple(corpora[i].labels[j] for i, j in turns) if options.label_mask else ()
    return replace(
        corpora[0], options=replace(options, source=name), sequences=sequences, labels=labels, mixture=mixture
    )


def allotted(total: int, weights: Sequence[int]) -> list[int]:
    """`total` in proportion to the weights, rounded by largest remainders, of equal ones the earlier first."""
    of = sum(weights)
    counts = [total * weight // of for weight in weights]
    order = sorted(range(len(weights)), key=lambda i: -(total * weights[i] % of))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _turns(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(corpus, number in it) of all sequences; the next one of the corpus that is furthest behind its share."""
    total, taken, turns = sum(counts), [0] * len(counts), []
    for position in range(1, total + 1):
        behind = [count * position - total * done for count, done in zip(counts, taken, strict=True)]
        i = behind.index(max(behind))
        turns.append((i, taken[i]))
        taken[i] += 1
    return turns
