"""The GSM8K example on a tiny model: its lines of results, its losses and its answers."""

import json
import runpy
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from transformers import AutoModelForCausalLM

import prep

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_gsm8k.py"


@pytest.fixture(scope="module")
def example():
    return SimpleNamespace(**runpy.run_path(str(EXAMPLE)))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Model, store with the bases of two variants, and questions whose answers are numbers."""
    given = tiny.sources(tmp_path_factory.mktemp("example"))
    given.store = given.path / "s.zarr"
    prep.covariance(given.model, given.data, store=given.store, **tiny.RUN)
    prep.decompose(given.store, for_="antipasto_corda", rank=8, quiet=True)
    given.rows = [{"question": text, "answer": text.split()[0]} for text in tiny.texts(30)]
    given.questions = given.path / "questions.jsonl"
    given.questions.write_text("".join(json.dumps(row) + "\n" for row in given.rows))
    return given


@pytest.mark.parametrize("variant", ["lora", "antipasto_corda"])
def test_train_gsm8k(given, tmp_path, monkeypatch, variant):
    options = ["--model", given.model, "--store", given.store, "--data", given.questions, "--variant", variant]
    options += ["--rank", 4, "--steps", 2, "--held-out", 6, "--accuracy", 5, "--new-tokens", 4, "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, options)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert not ended.value.code
    (directory,) = tmp_path.iterdir()
    result = json.loads((directory / "result.json").read_text())
    assert result["questions"] == 5 and 0 <= result["accuracy"] <= 1 and result["rank"] == 4
    assert result["loss_before"] != result["loss_after"]
    base = AutoModelForCausalLM.from_pretrained(given.model)
    if variant == "lora":
        peft = pytest.importorskip("peft")
        peft.PeftModel.from_pretrained(base, directory)
    else:
        prep.load(base, directory / "adapter.safetensors")


def test_losses_are_those_of_transformers(example, given):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(given.model), tiny.tokenizer()
    rows = example.encode(given.rows[:5], tokenizer, 48)
    losses, tokens = example.row_losses(model, rows, 2)
    for row, loss, count in zip(rows, losses, tokens, strict=True):
        batch = {key: value[None] for key, value in row.items()}
        assert count == (row["labels"] != example.IGNORED).sum()
        assert loss / count == pytest.approx(model(**batch).loss.item(), abs=1e-5)


def test_answers_of_a_padded_batch(example, given):
    """Each answer is what the model writes for the question alone, without padding."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(given.model), tiny.tokenizer()
    rows = []
    for row in given.rows[:6]:
        prompt = tokenizer(example.PROMPT.format_map(row), return_tensors="pt")
        written = model.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)
        own = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        rows.append(row | {"answer": own})
    assert len({row["answer"] for row in rows}) > 1
    assert example.correct(model, tokenizer, rows, 3, 3) == [True] * 6
    wrong = [row | {"answer": "#### -1"} for row in rows]
    assert example.correct(model, tokenizer, wrong, 4, 3) == [False] * 6


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("48/2 = <<48/2=24>>24\n#### 24", "24"),
        ("#### 1,200\nQuestion: 7", "1200"),
        ("So she pays $1,234.50.", "1234.5"),
        ("3 + 4 is 7, that is 18.", "18"),
        ("#### -5", "-5"),
        ("there are 10-5", "5"),
        ("#### 18.0", "18"),
    ],
)
def test_final_number(example, answer, number):
    assert example.final_number(answer) == Decimal(number)


def test_no_number(example):
    assert example.final_number("none") is None
    assert example.final_number("#### none") is None
