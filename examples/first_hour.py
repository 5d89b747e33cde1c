"""A model of another family, from its text to a shared store: every step is run, and docs/first-hour.md written.

python examples/first_hour.py              # in a temporary directory; about ten minutes on two cores
python examples/first_hour.py DIRECTORY    # and keep what it makes

The model is a small Qwen3 with the tokenizer of SmolLM2 (see smollm2.py), trained here for a few minutes from random
weights on texts that come with Python, so that no hub is needed.
"""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from pydoc_data.topics import topics

from smollm2 import fetch

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "first-hour.md"
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}
NOTICES = ("Loading weights", "Failed to load CPU gemm", "{'")
STEPS, ROWS, LENGTH = 150, 8, 128  # of the training from random weights

HEAD = f"""# The first hour

A model of your own, from its text to a store that others use. Written by `python examples/first_hour.py`, which ran
every block below in an empty directory and put its output under it as it was, with `~/hour` for the directory and
without the notices of other libraries.

The model, `qwen`, is a Qwen3 of four blocks (hidden 256, inputs of up to 768, q and k normalised, keys shared by two
heads, tied embeddings) with the tokenizer of SmolLM2. It was trained from random weights for {STEPS} steps of
{ROWS} x {LENGTH} tokens: real in its shapes and in how its activations spread, not in what it can say. `topics.jsonl`
holds the help texts of Python, `docstrings.jsonl` the documentation of its modules: two kinds of text.
"""

TRAIN = """
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling
from transformers import Trainer, TrainingArguments

import prep

tokenizer = AutoTokenizer.from_pretrained("qwen")
rows = load_dataset("json", data_files="docstrings.jsonl", split="train")
rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=96), remove_columns=["text"])
rows = rows.filter(lambda row: len(row["input_ids"]) > 16).train_test_split(32, seed=0)

for init in ("lora", "corda_ipm", "whitened"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained("qwen")
    model = prep.peft.get_model(model, "prep.zarr", init, r=16, lora_alpha=16, task_type="CAUSAL_LM")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            f"runs/{init}",
            max_steps=24,
            per_device_train_batch_size=8,
            learning_rate=5e-4,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"{init:10} held-out loss {before:.3f} -> {trainer.evaluate()['eval_loss']:.3f}")
    prep.peft.save(model, f"adapters/{init}")
"""

PLAIN = """
import sys

sys.modules["prep"] = None  # as where it is not installed
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("qwen")
batch = tokenizer("Return the absolute value of the argument.", return_tensors="pt")
for init in ("lora", "corda_ipm", "whitened"):
    base = AutoModelForCausalLM.from_pretrained("qwen").eval()
    model = PeftModel.from_pretrained(base, f"adapters/{init}")
    with torch.no_grad():
        print(f"{init:10} {model(**batch, labels=batch['input_ids']).loss:.3f}")
"""

# what is said, and what is run: lines of the shell, or the name of a script and its text
SECTIONS: list[tuple[str, list[str] | tuple[str, str]]] = [
    (
        "## Calibrate\n\nTwice, on two kinds of text; what a layer sees of them is kept in two stores.",
        [
            "prep covariance --model qwen --data topics.jsonl --num-sequences 64 --seq-len 256 --store topics.zarr",
            "prep covariance --model qwen --data docstrings.jsonl --num-sequences 64 --seq-len 256 --store docs.zarr",
        ],
    ),
    (
        "Both together are a calibration, too, without the model and without reading the text again. Here the\n"
        "docstrings, on which the model is going to be trained, count twice:",
        ["prep pool topics.zarr docs.zarr --weights 1,2 --store prep.zarr"],
    ),
    (
        "## Decompose\n\nOnce, for every method that may be wanted. A slip of the pen meets the nearest name:",
        [
            "prep decompose --for corda_imp",
            "prep decompose --for corda_ipm,pissa --rank 64",
            "prep decompose --for whitened",
            "prep decompose --for eva --rank 32",
        ],
    ),
    (
        "What is there now. The activations of a model that was hardly trained lie in few directions: the bases that\n"
        "know of them, all but `identity`, keep nearly all of the energy.",
        ["prep info"],
    ),
    (
        "## Train with PEFT\n\nThree starts on the same rows, with the Trainer of transformers. `train.py`:",
        ("train.py", TRAIN),
    ),
    (
        "Each start trains; with one seed, one learning rate and a small model the figures rank nothing.\n\n"
        "## Load it where prep is not installed\n\n`plain.py`:",
        ("plain.py", PLAIN),
    ),
    (
        "## Share the store\n\n`push` and `pull` copy to and from any URL that fsspec can write,\n"
        "`s3://bucket/prep.zarr` say; a folder is one, too. Both verify what they wrote.",
        [
            "prep push file://$PWD/shared/prep.zarr",
            "prep pull file://$PWD/shared/prep.zarr --store colleague.zarr",
            "prep verify --store colleague.zarr --model qwen",
        ],
    ),
    (
        "Another script, which knows nothing of prep, starts from the same numbers:",
        ["prep export --store colleague.zarr --to peft-corda corda.pt --rank 32"],
    ),
]


def main() -> None:
    """Make the model and the texts, run every section, write the page."""
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(sys.argv[1] if len(sys.argv) > 1 else temporary).resolve()
        home.mkdir(parents=True, exist_ok=True)
        texts = write_texts(home)
        if not (home / "qwen").exists():
            make_model(home / "qwen", texts)
        page = HEAD
        for prose, what in SECTIONS:
            page += f"\n{prose}\n\n{run(what, home).rstrip()}\n"
            print(page.rsplit("\n## ", 1)[-1], flush=True)
    PAGE.write_text(page)
    print(f"written: {PAGE}")


def run(what: list[str] | tuple[str, str], home: Path) -> str:
    """Blocks of what was run and of what that printed."""
    if isinstance(what, tuple):
        name, code = what
        (home / name).write_text(code.lstrip())
        return f"```python\n{code.strip()}\n```\n\n{run([f'python {name}'], home)}"
    blocks = ""
    for command in what:
        blocks += f"```sh\n{command}\n```\n\n```text\n{printed(command, home)}\n```\n\n"
    return blocks


def printed(command: str, home: Path) -> str:
    """What a command prints, errors too; paths without the directory."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **QUIET}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(["bash", "-c", command], cwd=home, env=environment, **pipes)
    kept = [line for line in done.stdout.splitlines() if not line.startswith(NOTICES)]
    return "\n".join(kept).replace(str(home), "~/hour").rstrip()


def write_texts(home: Path) -> list[str]:
    """topics.jsonl and docstrings.jsonl; all their texts."""
    documents = {"topics": [text for _, text in sorted(topics.items())], "docstrings": sorted(docstrings())}
    for name, texts in documents.items():
        with (home / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return [text for texts in documents.values() for text in texts]


def docstrings() -> set[str]:
    """The documentation of the public functions and classes of Python's modules."""
    found = set()
    for name in sorted(sys.stdlib_module_names - {"antigravity", "this", "idlelib", "turtledemo", "test"}):
        if name.startswith("_") or importlib.util.find_spec(name) is None:
            continue
        try:
            module = importlib.import_module(name)
        except Exception:  # of other systems
            continue
        for value in vars(module).values():
            if inspect.isclass(value) or inspect.isroutine(value):
                found.add(inspect.getdoc(value) or "")
    return {text for text in found if len(text) > 80}


def make_model(path: Path, texts: list[str]) -> None:
    """A small Qwen3, trained from random weights on the texts."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(fetch(ROOT / ".cache" / "smollm2"))
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen3Config(vocab_size=len(tokenizer), max_position_embeddings=1024, **sizes, **heads, **ends)
    model = Qwen3ForCausalLM(config)
    ids = torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in [*ids, tokenizer.eos_token_id]])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, batch in zip(range(STEPS), torch.randint(len(rows), (STEPS, ROWS)), strict=True):
        loss = model(input_ids=rows[batch], labels=rows[batch]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"step {step}: loss {loss.item():.2f}", flush=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
