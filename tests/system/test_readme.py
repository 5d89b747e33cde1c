"""README.md and the pages on training do what they say: every block runs, in order, on a tiny model."""

import contextlib
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner
from transformers import Trainer, TrainingArguments

from prep.cli import main

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/peft.md", "docs/adapters.md", "docs/quantised.md")
BLOCK = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
INSTALLS = ("python3 -m venv", ".venv/bin/pip install")  # from the network; the wheel is built in test_packaging.py
STEPS = 2  # of any training that a page leaves to the reader


def blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """(place, language, text) of every fenced block."""
    text = (ROOT / page).read_text()
    for found in BLOCK.finditer(text):
        yield f"{page}:{text.count(chr(10), 0, found.start()) + 1}", found[1], found[2]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a model, data, and what the pages' names stand for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREP_STORE", raising=False)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    model = tiny.save(tiny.wide(), tmp_path / "tiny")
    halves = zip(tiny.texts(80), tiny.texts(80, seed=1), strict=True)
    rows = [json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in halves]
    (tmp_path / "gsm8k_train.jsonl").write_text("".join(rows))
    return SimpleNamespace(
        path=tmp_path,
        names={
            "HuggingFaceTB/SmolLM2-135M-Instruct": model,
            "openai/gsm8k --subset main": "gsm8k_train.jsonl",
            "--num-sequences 64 --seq-len 256": "--num-sequences 16 --seq-len 32",
            "corda.pt --rank 32": "corda.pt --rank 16",  # no layer is wider
            "--variant VARIANT": "--variant lora_xs",
            "checkpoint-500": f"checkpoint-{STEPS}",
            "s3://bucket/": f"{(tmp_path / 'bucket').as_uri()}/",
        },
    )


def translated(text: str, names: dict[str, str]) -> str:
    for name, stands_for in names.items():
        text = text.replace(name, stands_for)
    return text


def run_shell(text: str, place: str) -> None:
    """Every command: `prep` as the command line would run it, a script of the examples as Python would."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith(INSTALLS) or not line.strip():
            continue
        words = shlex.split(line, comments=True)
        if words[0] == "prep":
            done = CliRunner().invoke(main, words[1:])
            assert done.exit_code == 0, f"{place}: {line}\n{done.output}\n{done.exception!r}"
            continue
        assert words[0] == "python", f"{place}: {line}"
        before, sys.argv = sys.argv, words[1:]
        try:
            with contextlib.redirect_stdout(sys.stderr), pytest.raises(SystemExit) as ended:
                runpy.run_path(words[1], run_name="__main__")
        finally:
            sys.argv = before
        assert ended.value.code in (None, 0), place


def run_python(text: str, place: str, names: dict[str, Any]) -> None:
    """The block, with the training that a line `...` leaves to the reader."""
    code = re.sub(r"^\.\.\..*$", "train(model)", text, flags=re.MULTILINE)
    exec(compile(code, place, "exec"), names)


def train(model: torch.nn.Module) -> None:
    """A few steps of the Trainer, which leaves a checkpoint."""
    rows = [{"input_ids": torch.arange(3, 20), "labels": torch.arange(3, 20)} for _ in range(4)]
    arguments = TrainingArguments(
        output_dir=".", max_steps=STEPS, save_steps=STEPS, report_to=[], use_cpu=True, disable_tqdm=True
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()  # type: ignore[arg-type]


def test_every_block_runs_in_order_on_a_tiny_model(here):
    run = {"sh": 0, "python": 0, "text": 0}
    for page in PAGES:
        ids = torch.arange(3, 20)[None]
        names: dict[str, Any] = {"train": train, "batch": {"input_ids": ids, "labels": ids}}
        for place, language, text in blocks(page):
            text = translated(text, here.names)
            if language == "sh":
                run_shell(text, place)
            elif language == "python":
                run_python(text, place, names)
            assert language in run, f"{place}: call the block sh, python or, if it is output, text"
            run[language] += 1
    assert run["sh"] >= 5 and run["python"] >= 8, run


def test_what_is_called_text_is_no_command():
    for page in PAGES:
        for place, language, text in blocks(page):
            if language == "text":
                assert not re.search(r"^(\$ |prep \w|python|import |from .* import )", text, re.MULTILINE), place


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_commands_within_the_text_have_the_options_they_name(page):
    for command in re.findall(r"`(prep [a-z][^`]*)`", (ROOT / page).read_text()):
        words = command.replace("\\", " ").split()
        for name in words[1].split("|"):
            if name in main.commands:
                known = {
                    flag for option in main.commands[name].params for flag in (*option.opts, *option.secondary_opts)
                }
                used = {word for word in words[2:] if word.startswith("-")}
                assert used <= known | {"--help"}, f"{page}: {command}"
            else:
                assert not name.isalpha(), f"{page}: {command}"


def test_the_first_hour_is_that_of_its_script(monkeypatch):
    """The page holds every step of examples/first_hour.py in order, and no step has failed by surprise."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    script = runpy.run_path(str(ROOT / "examples" / "first_hour.py"))
    page = (ROOT / "docs" / "first-hour.md").read_text()
    rest = page.removeprefix(script["HEAD"])
    assert rest != page
    for prose, what in script["SECTIONS"]:
        commands = what if isinstance(what, list) else [f"python {what[0]}"]
        code = [] if isinstance(what, list) else [f"```python\n{what[1].strip()}\n```"]
        for part in (prose, *code, *(f"```sh\n{command}\n```" for command in commands)):
            before, found, rest = rest.partition(part)
            assert found and "Traceback" not in before, part
    assert [line for line in page.splitlines() if line.startswith("Error: ")] == re.findall("Error: --for 'cor.*", page)
    assert str(Path.home()) not in page


def test_the_readme_fits_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 137
