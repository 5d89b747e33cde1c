"""Corpus: every kind of source, the cutting against a few independent lines, masks, and one line per mistake."""

import csv
import glob
import gzip
import json
import re
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import xxhash
from fsspec.compression import compr
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prep import PrepError
from prep.preprocess.corpus.text import CorpusOptions, load_corpus

WORDS = [f"w{i}" for i in range(200)]
VOCABULARY = {
    word: i for i, word in enumerate(["<unk>", "<end>", "<pad>", "<cls>", "<sep>", "\n", "\t", "\\", "n", *WORDS])
}
UNK, END, PAD, CLS, SEP = range(5)
CHAT = "{% for m in messages %}{{ m.role }} {{ m.content }} <end> {% endfor %}"


def make_tokenizer(post=None, **settings):
    """Words and whitespace marks are tokens, and "~" is none, so a test can write the expected ids by hand."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(mark, "isolated") for mark in "\n\t\\"]
        + [pre_tokenizers.Split(mark, "removed") for mark in " ~"]
    )
    if post is not None:
        special = [("<cls>", CLS), ("<sep>", SEP), ("<end>", END)]
        tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=special)
    settings = {"eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<unk>", **settings}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def ids(text):
    return [VOCABULARY.get(word, UNK) for word in text.split(" ")]


def documents(count=20, seed=0):
    """`count` distinct documents of 3 to 9 words; the first word of document i is `w{i}`."""
    draw = np.random.default_rng(seed)
    return [" ".join([WORDS[i], *draw.choice(WORDS[100:], draw.integers(2, 9))]) for i in range(count)]


def write(path, rows):
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows, indent=1))
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        case ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        case ".txt":
            path.write_text("\n".join(row["text"] for row in rows))
    return str(path)


def whole(source, count, tokenizer, **options):
    """All `count` documents of a source, one sequence each."""
    options = {"num_sequences": count, "pack": False, "seq_len": 100, **options}
    return [s.tolist() for s in load_corpus(CorpusOptions(str(source), **options), tokenizer).sequences]


def message(source, tokenizer, **options):
    """The error for these options, checked to be one short line."""
    with pytest.raises(PrepError) as caught:
        load_corpus(CorpusOptions(str(source), **{"num_sequences": 1, "seq_len": 4, **options}), tokenizer)
    line = str(caught.value)
    assert line
    assert "\n" not in line
    assert len(line) < 1000
    return line


# Sources


@pytest.mark.parametrize("extension", [".jsonl", ".json", ".parquet", ".csv", ".txt", ".JSONL"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path, tokenizer, extension):
    texts = documents()
    path = tmp_path / f"data{extension.lower()}"
    write(path, [{"text": text, "n": i} for i, text in enumerate(texts)])
    path = path.rename(tmp_path / f"data{extension}")
    assert sorted(whole(path, 20, tokenizer)) == sorted(map(ids, texts))


def compressed(path, rows, codec="gzip"):
    """What `write` writes, compressed by pyarrow."""
    write(path, rows)
    packed = Path(f"{path}{'.gz' if codec == 'gzip' else '.zst'}")
    with pyarrow.CompressedOutputStream(str(packed), codec) as out:
        out.write(path.read_bytes())
    path.unlink()
    return str(packed)


@pytest.mark.parametrize("extension", [".jsonl", ".json", ".csv", ".txt"])
@pytest.mark.parametrize("case", [str.lower, str.upper])
@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_compressed_files_give_the_same_documents(tmp_path, tokenizer, extension, case, codec):
    if codec == "zstd":
        pytest.importorskip("zstandard")
    texts = documents()
    rows = [{"text": text} for text in texts]
    packed = compressed(tmp_path / f"d 1{extension}", rows, codec)
    renamed = Path(packed).rename(tmp_path / f"e 1{case(''.join(Path(packed).suffixes))}")
    found = whole(renamed, len(texts), tokenizer)
    assert sorted(found) == sorted(map(ids, texts))
    assert found == whole(write(tmp_path / f"plain{extension}", rows), len(texts), tokenizer)


def test_compressed_and_plain_files_are_read_together(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", [{"text": "w1 w2"}])
    compressed(tmp_path / "b.jsonl", [{"text": "w3 w4"}])
    compressed(tmp_path / "c.jsonl", [])
    assert sorted(whole(tmp_path / "*.jsonl*", 2, tokenizer)) == [ids("w1 w2"), ids("w3 w4")]


def test_compressed_files_that_cannot_be_read_are_one_line(tmp_path, tokenizer):
    packed = Path(compressed(tmp_path / "a.jsonl", [{"text": text} for text in documents()]))
    packed.write_bytes(packed.read_bytes()[:-40])
    assert message(packed, tokenizer).startswith(f"cannot read {packed} (")
    (tmp_path / "b.jsonl.gz").write_text("{}")
    assert message(tmp_path / "b.jsonl.gz", tokenizer).startswith(f"cannot read {tmp_path}/b.jsonl.gz (")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b"[" * 100_000))
    assert "is nested more than 100 deep" in message(tmp_path / "c.jsonl.gz", tokenizer)
    named = compressed(tmp_path / "d[1].jsonl", [{"text": "w1"}])
    assert message(named, tokenizer) == f"{named} is compressed and has a bracket in its path: rename it"
    (tmp_path / "d.parquet.gz").write_text("x")
    assert "convert it to one of" in message(tmp_path / "d.parquet.gz", tokenizer)


def test_zstd_without_its_package_names_it(tmp_path, tokenizer, monkeypatch):
    monkeypatch.delitem(compr, "zstd", raising=False)
    packed = compressed(tmp_path / "a.jsonl", [{"text": "w1"}], "zstd")
    assert message(packed, tokenizer) == f"reading {packed} needs a package: pip install zstandard"


def test_files_are_streamed_and_leave_no_copy(tmp_path, tokenizer, monkeypatch):
    import datasets

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    whole(write(tmp_path / "a.parquet", [{"text": text} for text in documents()]), 20, tokenizer)
    assert sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) == 0


def test_local_files_need_no_network(tmp_path, tokenizer, monkeypatch):
    looked_up: list[object] = []

    def look_up(host, *rest, **settings):
        looked_up.append(host)
        return []

    monkeypatch.setattr("socket.getaddrinfo", look_up)
    for extension in (".jsonl", ".parquet", ".csv", ".txt"):
        assert whole(write(tmp_path / f"a{extension}", [{"text": "w1"}]), 1, tokenizer) == [ids("w1")]
    assert looked_up == []


def test_glob_reads_all_files_in_an_order_of_their_names(tmp_path, tokenizer, monkeypatch):
    texts = documents(30)
    names = ["c.jsonl", "a.jsonl", "b.jsonl"]
    for turn, order in enumerate((names, names[::-1])):
        folder = tmp_path / str(turn) / "deep"
        folder.mkdir(parents=True)
        for name in order:
            part = texts[10 * "abc".index(name[0]) :][:10]
            write(folder / name, [{"text": text} for text in part])
    first = whole(tmp_path / "0/deep/*.jsonl", 30, tokenizer)
    assert sorted(first) == sorted(map(ids, texts))
    assert whole(tmp_path / "1/deep/*.jsonl", 30, tokenizer) == first
    assert whole(tmp_path / "1/**/*.jsonl", 30, tokenizer) == first
    listed = glob.glob
    for turned in (sorted, partial(sorted, reverse=True)):  # as other file systems may list them
        monkeypatch.setattr("glob.glob", lambda *args, turned=turned, **settings: turned(listed(*args, **settings)))
        assert whole(tmp_path / "0/deep/*.jsonl", 30, tokenizer) == first


def test_all_files_feed_the_shuffle(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("prep.preprocess.corpus.rows.SHUFFLE_BUFFER", 4)
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [{"text": f"w{ord(name)} w1"}] * 20)
    assert {document[0] for document in whole(tmp_path / "*.jsonl", 8, tokenizer)} == {
        VOCABULARY["w97"],
        VOCABULARY["w98"],
    }


def test_names_that_look_like_patterns_are_names(tmp_path, tokenizer):
    for name in ("a[1].jsonl", "b*.jsonl", "c d#?.jsonl"):
        path = write(tmp_path / name, [{"text": f"w{ord(name[0])}"}])
        assert whole(path, 1, tokenizer) == [ids(f"w{ord(name[0])}")]


def test_empty_files_among_others_are_skipped(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").touch()
    write(tmp_path / "b.jsonl", [{"text": "w1 w2"}])
    assert whole(tmp_path / "*.jsonl", 1, tokenizer) == [ids("w1 w2")]


def test_a_directory_has_subsets_and_splits(tmp_path, tokenizer):
    for name in ("one", "two"):
        write(tmp_path / f"{name}.jsonl", [{"text": f"w{len(name)} {name}"}])
    write(tmp_path / "test.jsonl", [{"text": "w5 w6"}])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: main\n  data_files:\n  - {split: train, path: one.jsonl}\n  - {split: test, path: test.jsonl}\n"
        "- config_name: other\n  data_files: two.jsonl\n---\n"
    )
    assert whole(tmp_path, 1, tokenizer, subset="main", split="test") == [ids("w5 w6")]
    assert whole(tmp_path, 1, tokenizer, subset="other")[0][0] == VOCABULARY["w3"]

    line = message(tmp_path, tokenizer)
    assert line == f"{tmp_path} has several subsets: choose with --subset, one of ['main', 'other']"
    line = message(tmp_path, tokenizer, subset="nope")
    assert line == f"{tmp_path} has no subset 'nope': choose with --subset, one of ['main', 'other']"
    for split in ("nope", "train[:2]"):
        line = message(tmp_path, tokenizer, subset="main", split=split)
        assert line == f"{tmp_path} has no split {split!r}: choose with --split, one of ['train', 'test']"


def test_order_depends_on_the_seed_alone(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in documents()])
    first, again, other = (whole(path, 20, tokenizer, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)
    assert first != list(map(ids, documents()))


def test_only_as_many_documents_are_tokenised_as_needed(tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    seen: list[str] = []
    plain = type(tokenizer).__call__

    def spy(self, texts, **settings):
        seen.extend(texts)
        return plain(self, texts, **settings)

    monkeypatch.setattr(type(tokenizer), "__call__", spy)
    monkeypatch.setattr("prep.preprocess.corpus.render.CHUNK_CHARACTERS", 60)
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in documents(100)])
    assert len(whole(path, 2, tokenizer)) == 2
    assert 2 <= len(seen) <= 30


# Documents


def test_template_escapes_braces_and_numbers(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"question": "w1", "the answer": "w2", "n": 3}])
    for template, expected in [
        (r"{question}\n{the answer}", "w1\nw2"),
        ("{question}\n{the answer}", "w1\nw2"),
        (r"\t{question}\\n w4", "\tw1\\n w4"),
        (r"{{{question}}} w{n}", "{w1} w3"),
        ("{the answer} {question} {the answer}", "w2 w1 w2"),
    ]:
        words = expected.replace("\n", " \n ").replace("\t", "\t ").replace("\\", " \\ ")
        assert whole(path, 1, tokenizer, template=template) == [ids(words)], template


def test_text_column_is_found(tmp_path, tokenizer):
    only = write(tmp_path / "only.csv", [{"n": 1, "body": "w1 w2"}])
    both = write(tmp_path / "both.jsonl", [{"body": "w1", "text": "w2"}])
    assert whole(only, 1, tokenizer) == [ids("w1 w2")]
    assert whole(both, 1, tokenizer) == [ids("w2")]
    assert whole(both, 1, tokenizer, text_column="body") == [ids("w1")]


def test_missing_and_blank_documents_are_skipped(tmp_path, tokenizer):
    values = [(None, "w9"), ("", "w9"), (" \n", "w9"), ("~", "~"), ("w1", None), ("w2", "w3")]
    rows = [{"text": text, "b": b} for text, b in values]
    path = write(tmp_path / "a.jsonl", rows)
    assert sorted(whole(path, 2, tokenizer)) == sorted([ids("w1"), ids("w2")])
    line = message(path, tokenizer, template="{text} {b}", num_sequences=5, pack=False)
    assert "gives 3 documents, 5 were" in line  # "{blank} w9" is not blank
    text = write(tmp_path / "a.txt", [{"text": "w1"}, {"text": ""}, {"text": "  "}, {"text": "w2"}])
    assert sorted(whole(text, 2, tokenizer)) == sorted([ids("w1"), ids("w2")])
    assert "gives 2 documents, 3 were" in message(text, tokenizer, num_sequences=3, pack=False)


def test_chat_column_uses_the_template_and_adds_nothing(tmp_path):
    tokenizer = make_tokenizer(post="<cls> $A <sep>", chat_template=CHAT)
    talk = [{"role": "w1", "content": "w2"}, {"role": "w3", "content": "w4", "name": "x"}]
    for extension in (".jsonl", ".parquet"):
        path = write(tmp_path / f"a{extension}", [{"messages": talk, "text": "w9"}])
        assert whole(path, 1, tokenizer, chat_column="messages") == [ids("w1 w2 <end> w3 w4 <end>")]
    assert whole(path, 1, tokenizer) == [[CLS, *ids("w9"), SEP]]


def test_chat_keys_that_a_message_lacks_stay_absent(tmp_path):
    template = "{% for m in messages %}{{ 'w1' if m.name is defined else 'w2' }} {{ m.content }} {% endfor %}"
    talk = [{"role": "user", "content": "w3", "name": "x"}, {"role": "user", "content": "w4", "name": None}]
    path = write(tmp_path / "a.parquet", [{"messages": talk}])
    tokenizer = make_tokenizer(chat_template=template)
    assert whole(path, 1, tokenizer, chat_column="messages") == [ids("w1 w3 w2 w4")]


# Sequences


@pytest.mark.parametrize(
    ("post", "special", "end"),
    [
        (None, {}, END),
        ("$A <end>", {}, END),  # ends with the end token already
        ("<cls> $A <sep>", {"eos_token": None, "sep_token": "<sep>"}, SEP),
        ("<cls> $A", {"eos_token": None}, None),
    ],
)
def test_packing_joins_cuts_and_drops_the_tail(tmp_path, post, special, end):
    tokenizer = make_tokenizer(post, **special)
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in documents(60)])
    stream: list[int] = []
    for document in whole(path, 60, tokenizer):
        stream += document if end is None or document[-1] == end else [*document, end]
    count = len(stream) // 16
    corpus = load_corpus(CorpusOptions(path, num_sequences=count, seq_len=16), tokenizer)
    assert [s.tolist() for s in corpus.sequences] == [stream[16 * i : 16 * i + 16] for i in range(count)]
    assert corpus.tokens == 16 * count
    assert {s.dtype for s in corpus.sequences} == {np.dtype("int32")}
    some = load_corpus(CorpusOptions(path, num_sequences=3, seq_len=16), tokenizer)
    assert np.array_equal(some.sequences, corpus.sequences[:3])
    assert f"--num-sequences {count}," in message(path, tokenizer, num_sequences=count + 1, seq_len=16)


def test_packed_batches(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in documents(60)])
    corpus = load_corpus(CorpusOptions(path, num_sequences=7, seq_len=8), tokenizer)
    batches = list(corpus.batches(3))
    assert [set(batch) for batch in batches] == [{"input_ids"}] * 3
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(3, 8), (3, 8), (1, 8)]
    joined = torch.cat([batch["input_ids"] for batch in batches])
    assert joined.dtype == torch.int64
    assert joined.tolist() == [s.tolist() for s in corpus.sequences]
    rest = torch.cat([batch["input_ids"] for batch in corpus.batches(2, start=3)])
    assert torch.equal(rest, joined[3:])
    with pytest.raises(PrepError, match="--batch-size is 0"):
        next(corpus.batches(0))


@pytest.mark.parametrize("side", ["left", "right"])
def test_unpacked_batches_are_padded_and_masked(tmp_path, side):
    tokenizer = make_tokenizer(padding_side=side)
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11"]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    corpus = load_corpus(CorpusOptions(path, num_sequences=3, seq_len=5, pack=False), tokenizer)
    assert corpus.tokens == 3 + 1 + 5
    assert corpus.padding_side == side
    (batch,) = corpus.batches(4)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        key: (torch.int64, (3, 5)) for key in ("input_ids", "attention_mask", "position_ids")
    }
    expected = {
        "left": {
            3: ([PAD, PAD, *ids(texts[0])], [0, 0, 1, 1, 1], [0, 0, 0, 1, 2]),
            1: ([PAD] * 4 + ids(texts[1]), [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]),
            5: (ids(texts[2])[:5], [1] * 5, [0, 1, 2, 3, 4]),
        },
        "right": {
            3: ([*ids(texts[0]), PAD, PAD], [1, 1, 1, 0, 0], [0, 1, 2, 2, 2]),
            1: (ids(texts[1]) + [PAD] * 4, [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
            5: (ids(texts[2])[:5], [1] * 5, [0, 1, 2, 3, 4]),
        },
    }[side]
    for row, sequence in enumerate(corpus.sequences):
        got = tuple(batch[key][row].tolist() for key in ("input_ids", "attention_mask", "position_ids"))
        assert got == expected[len(sequence)]
    assert [b["input_ids"].shape[1] for b in corpus.batches(1)] == list(map(len, corpus.sequences))


def test_truncation_keeps_special_tokens_where_they_fit(tmp_path):
    tokenizer = make_tokenizer("<cls> $A <sep>")
    path = write(tmp_path / "a.jsonl", [{"text": "w1 w2 w3 w4"}])
    assert whole(path, 1, tokenizer, seq_len=4) == [[CLS, *ids("w1 w2"), SEP]]
    assert whole(path, 1, tokenizer, seq_len=1) == [[CLS]]


@pytest.mark.parametrize(
    ("special", "pad"), [({}, PAD), ({"pad_token": None}, END), ({"pad_token": None, "eos_token": None}, 0)]
)
def test_padding_token(tmp_path, special, pad):
    path = write(tmp_path / "a.jsonl", [{"text": "w1"}])
    corpus = load_corpus(CorpusOptions(path, num_sequences=1, seq_len=9, pack=False), make_tokenizer(**special))
    assert corpus.pad_id == pad


def test_hash_is_of_tokens_and_lengths(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in documents()])
    corpus = load_corpus(CorpusOptions(path, num_sequences=20, seq_len=100, pack=False), tokenizer)
    lengths = [len(s) for s in corpus.sequences]
    tokens = [int(token) for s in corpus.sequences for token in s]
    data = struct.pack(f"<{len(lengths)}q", *lengths) + struct.pack(f"<{len(tokens)}i", *tokens)
    assert corpus.hash == xxhash.xxh3_128_hexdigest(data)
    other = load_corpus(CorpusOptions(path, num_sequences=20, seq_len=100, pack=False, seed=1), tokenizer)
    assert other.hash != corpus.hash


def test_long_documents_give_no_warning_and_others_still_do(tmp_path, caplog):
    tokenizer = make_tokenizer(model_max_length=4)
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in documents(30)])
    load_corpus(CorpusOptions(path, num_sequences=4, seq_len=16), tokenizer)
    assert caplog.messages == []
    tokenizer("w1 w2 w3 w4 w5 w6")
    assert "longer than the specified maximum" in caplog.text


def test_settings_of_the_libraries_are_put_back(tmp_path, tokenizer):
    import logging

    import datasets

    path = write(tmp_path / "a.jsonl", [{"text": "w1", "n": 1}])
    reports = logging.getLogger("datasets.packaged_modules")

    def settings():
        return datasets.are_progress_bars_disabled(), datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, reports.level

    before = settings()
    whole(path, 1, tokenizer)
    message(path, tokenizer, text_column="n")
    message(tmp_path / "none.jsonl", tokenizer)
    assert settings() == before


# Mistakes


def test_too_little_data_says_what_there_is(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": "w1 w2 w3"}] * 10)  # 40 tokens with the end tokens
    assert message(path, tokenizer, num_sequences=8, seq_len=16) == (
        f"{path} gives 2 sequences of 16 tokens, 8 were asked for: "
        "use --num-sequences 2, --seq-len 5, --no-pack (10 documents), more data"
    )
    assert load_corpus(CorpusOptions(path, num_sequences=8, seq_len=5), tokenizer).tokens == 40
    line = message(path, tokenizer, num_sequences=50, seq_len=64)
    assert line == f"{path} gives 0 sequences of 64 tokens, 50 were asked for: use --no-pack (10 documents), more data"
    one = write(tmp_path / "one.jsonl", [{"text": "w1 w2 w3 w4 w5 w6 w7 w8 w9"}])
    line = message(one, tokenizer, num_sequences=8, seq_len=2)
    assert line.endswith("8 were asked for: use --num-sequences 5, --seq-len 1, more data")
    line = message(path, tokenizer, num_sequences=11, pack=False)
    assert line == f"{path} gives 10 documents, 11 were asked for: use --num-sequences 10, more data"


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("b.jsonl", "\n\n"), ("c.json", "[]"), ("d.csv", ""), ("e.csv", "text,n\n"), ("f.txt", "\n \n")],
)
def test_empty_data(tmp_path, tokenizer, name, content):
    (tmp_path / name).write_text(content)
    line = message(tmp_path / name, tokenizer)
    assert line == f"{tmp_path / name} holds no text: every document is missing or blank; give other --data"


def test_empty_parquet(tmp_path, tokenizer):
    table = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "holds no text" in message(tmp_path / "a.parquet", tokenizer)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bad.jsonl", b'{"text": "w1"}\n{"text": \n'),
        ("bad.json", b'[{"text": "w1"}, {"te'),
        ("bad.parquet", b"nothing of the kind"),
        ("bad.csv", b'text\nw1\n"w2\n'),
        ("bad.txt", b"w1 caf\xe9\n"),
    ],
)
def test_malformed_files_are_named(tmp_path, tokenizer, name, content, caplog):
    write(tmp_path / name.replace("bad", "good"), [{"text": "w1"}])
    bad = tmp_path / name
    bad.write_bytes(content)
    for source in (bad, tmp_path / f"*{bad.suffix}"):
        line = message(source, tokenizer, num_sequences=9)
        assert line.startswith(f"cannot read {bad} (")
    assert caplog.messages == []


def test_sources_that_are_not_there(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in ("foo.jsonl", "data/foo.csv", "./foo", "/no/such/folder", str(tmp_path / "foo.parquet")):
        assert message(source, tokenizer) == f"no such file: {source}; check --data"
    assert message("data/*.jsonl", tokenizer) == "no file matches data/*.jsonl: check --data"
    (tmp_path / "a.xlsx").touch()
    assert (
        message("a.xlsx", tokenizer)
        == "cannot read a.xlsx: convert it to one of .jsonl .json .parquet .csv .txt, also with .gz or .zst"
    )
    write(tmp_path / "a.jsonl", [{"text": "w1"}])
    write(tmp_path / "a.txt", [{"text": "w1"}])
    assert "several kinds (.jsonl, .txt, .xlsx)" in message("a.*", tokenizer)
    (tmp_path / "folder").mkdir()
    assert "holds no data files" in message("folder", tokenizer)
    for source in ("text", "json", ""):
        assert f"{source!r} is no file, directory or hub id" in message(source, tokenizer)
    assert "leave it out" in message("a.jsonl", tokenizer, subset="main")
    assert "no split 'test': choose with --split, one of ['train']" in message("a.jsonl", tokenizer, split="test")


@pytest.mark.parametrize("source", ["nobody/nothing", "nothing-at-all"])
def test_a_hub_that_is_not_reached(tokenizer, monkeypatch, source):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    line = message(source, tokenizer)
    assert line.startswith(f"{source} is no file or directory here, and the hub was not reached")
    assert "--data" in line


def test_wrong_columns(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"question": "w1", "answer": "w2", "n": 1, "tags": ["x"]}])
    line = message(path, tokenizer)
    for part in ("question, answer, n, tags", "--text-column", r"--template '{NAME}\n{NAME}'"):
        assert part in line
    for options in ({"text_column": "body"}, {"template": "{question} {body}"}, {"chat_column": "body"}):
        line = message(path, make_tokenizer(chat_template=CHAT), **options)
        flag = f"--{next(iter(options)).replace('_', '-')}"
        assert line == f"{flag} names 'body', but {path} has the columns question, answer, n, tags"
    assert "column 'n' holds int, not text" in message(path, tokenizer, text_column="n")
    assert "column 'tags' holds list, not text" in message(path, tokenizer, template="{tags}")


@pytest.mark.parametrize("template", ["{a.b}", "{a[0]}", "{0}", "{}", "{a!r}", "{a:>9}"])
def test_template_fields_are_plain_names(tokenizer, template):
    line = message("unread.jsonl", tokenizer, template=template)
    assert line == f"--template {template!r}: only column names can stand in braces, as in {{question}}"


@pytest.mark.parametrize(("template", "part"), [("{a", "malformed"), ("a}", "malformed"), ("plain {{a}}", "no column")])
def test_malformed_templates(tokenizer, template, part):
    line = message("unread.jsonl", tokenizer, template=template)
    assert line.startswith(f"--template {template!r} ")
    assert part in line


def test_wrong_options(tokenizer):
    line = message("unread.jsonl", tokenizer, text_column="a", template="{b}")
    assert line == "--text-column and --template exclude each other: give one of them"
    assert "--num-sequences is 0" in message("unread.jsonl", tokenizer, num_sequences=0)
    assert "--seq-len is -1" in message("unread.jsonl", tokenizer, seq_len=-1)
    assert "no chat template" in message("unread.jsonl", tokenizer, chat_column="messages")


def test_wrong_chats(tmp_path):
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('roles must\nalternate') }}")
    rows = [{"text": "w1", "from": [{"from": "human", "value": "w1"}], "ok": [{"role": "user", "content": "w1"}]}]
    path = write(tmp_path / "a.jsonl", rows)
    for column in ("text", "from"):
        line = message(path, tokenizer, chat_column=column)
        assert line.startswith(f"column {column!r} is no list of messages with a role and a content")
    line = message(path, tokenizer, chat_column="ok")
    assert line.startswith("the chat template refuses a row of column 'ok' (roles must alternate)")


CONVERSATION = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"messages": CONVERSATION}, "read them with --chat-column messages"),
        (
            {"id": "w3", "messages": CONVERSATION},
            "--chat-column messages, or take a text with --text-column, one of id",
        ),
        ({"id": "w3", "prompt": "w1", "chosen": CONVERSATION}, "--chat-column chosen, or take a text .* id, prompt"),
    ],
)
def test_conversations_without_the_option_are_sent_to_it(tmp_path, row, advice):
    tokenizer = make_tokenizer(chat_template=CHAT)
    path = write(tmp_path / "a.jsonl", [row] * 3)
    line = message(path, tokenizer)
    assert re.search(f"holds conversations in the column .*{advice}", line)
    column = next(name for name, value in row.items() if value is CONVERSATION)
    assert f"conversations, not text: use --chat-column {column}" in message(path, tokenizer, text_column=column)
    assert f"conversations, not text: use --chat-column {column}" in message(path, tokenizer, template=f"{{{column}}}")
    assert whole(path, 1, tokenizer, chat_column=column) == [ids("user w1 <end> assistant w2 <end>")]


def test_a_column_called_text_is_read_beside_conversations(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "w1 w2", "messages": CONVERSATION}])
    assert whole(path, 1, make_tokenizer(chat_template=CHAT)) == [ids("w1 w2")]


def test_conversations_and_a_tokenizer_without_a_template(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"messages": CONVERSATION}])
    assert "the tokenizer has no chat template: give a --model that has one, or data with" in message(path, tokenizer)
    line = message(path, tokenizer, chat_column="messages")
    assert line.endswith("give a --model that has one, or data with the text in a column")
    assert "--template" not in line and "--text-column" not in line  # which would send it back here


@pytest.mark.parametrize(("name", "value"), [("t.jsonl", 2), ("t.json", 1)])
def test_json_that_is_nested_too_deep_does_not_take_the_process_down(tmp_path, tokenizer, name, value):
    deep = "[" * 100_000 + "]" * 100_000
    (tmp_path / name).write_text(f'{{"text": "a"}}\n{{"text": "b", "x": {deep}}}\n')
    said = rf"{name} \(value {value}\) cannot be read: it is nested more than 100 deep; give other --data"
    with pytest.raises(PrepError, match=said):
        load_corpus(CorpusOptions(str(tmp_path / name), num_sequences=1, seq_len=4), tokenizer)
