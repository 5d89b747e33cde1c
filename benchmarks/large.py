"""Both commands on a model that need not fit into memory: peak resident memory, bytes read, and time.

    python benchmarks/large.py make llama --billions 3 --path /tmp/llama
    python benchmarks/large.py covariance --model /tmp/llama --store /tmp/llama.zarr
    python benchmarks/large.py decompose --model /tmp/llama --store /tmp/llama.zarr

`make` writes a Llama, or a mixture of experts of Qwen3's kind, with random bfloat16 weights, one block per safetensors
file, of which one is in memory at a time, with a tokenizer and random text; delete the folder afterwards. `covariance`
goes block by block; `decompose` takes the metric full where the store has moments, otherwise identity. Each is a
process of its own, stopped after `--seconds`, of which is printed: VmHWM, which counts mapped files, too; the bytes of
tensors that were read from the checkpoint, beside its size; and rchar, all that its system calls read, the store's and
Python's own files among it.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import prep
from prep import cli
from prep.preprocess.model.tensors import Tensors

SIZES = {"vocab_size": 32000, "tie_word_embeddings": True, "max_position_embeddings": 4096}
LLAMA = {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8}
MOE = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4, "num_experts": 32}
MOE |= {"moe_intermediate_size": 768, "num_experts_per_tok": 4, "intermediate_size": 768, "head_dim": 128}
KINDS = {"llama": ("llama", LLAMA), "moe": ("qwen3_moe", MOE)}


WORDS = 1000  # of the text


def main() -> None:
    """Make a checkpoint, or calibrate or decompose one."""
    if sys.argv[1:2] == ["counted"]:
        counted(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    options = arguments()
    print(make(options) if options.command == "make" else run(options))


def arguments() -> argparse.Namespace:
    """The command line."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = asked.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("kind", choices=KINDS)
    making.add_argument("--billions", type=float, default=3.0, help="parameters, about")
    making.add_argument("--path", type=Path, required=True)
    making.add_argument("--shrink", type=int, default=1, help="divide every width by this")
    for name in ("covariance", "decompose"):
        running = commands.add_parser(name)
        running.add_argument("--model", type=Path, required=True)
        running.add_argument("--store", type=Path, required=True)
        running.add_argument("--seconds", type=float, default=math.inf)
        if name == "covariance":
            running.add_argument("--num-sequences", default="16")
            running.add_argument("--seq-len", default="256")
            running.add_argument("--moment", default="auto")
            running.add_argument("--memory-budget", default="1GB")
        else:
            running.add_argument("--rank", default="64")
            running.add_argument("--solver", default="auto")
    return asked.parse_args()


def make(options: argparse.Namespace) -> str:
    """Write the checkpoint, block by block."""
    kind, widths = KINDS[options.kind]
    sizes = {key: max(4, value // options.shrink) if value >= 128 else value for key, value in widths.items()}
    config = AutoConfig.for_model(kind, **SIZES | sizes, num_hidden_layers=1, dtype="bfloat16")
    each = parameters(config, 2) - parameters(config, 1)
    config.num_hidden_layers = max(2, round(options.billions * 1e9 / each))
    config.architectures = [type(empty(config)).__name__]
    options.path.mkdir(parents=True)
    config.save_pretrained(options.path)
    files, total = {}, 0
    blocks = [f"model.layers.{i}" for i in range(config.num_hidden_layers)]
    for number, name in enumerate(["", *blocks]):
        weights = dict(drawn(config, name, number))
        file = f"model-{number:05}-of-{len(blocks) + 1:05}.safetensors"
        save_file(weights, options.path / file, {"format": "pt"})
        files |= dict.fromkeys(weights, file)
        total += sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (options.path / "model.safetensors.index.json").write_text(json.dumps(index))
    words = {word: number for number, word in enumerate(["<pad>", "<end>", *(f"w{i}" for i in range(WORDS))])}
    splitter = Tokenizer(WordLevel(words, unk_token="<end>"))
    splitter.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token="<pad>", eos_token="<end>").save_pretrained(
        options.path
    )
    draw = np.random.default_rng(0)
    texts = (" ".join(f"w{i}" for i in draw.integers(WORDS, size=300)) for _ in range(300))
    (options.path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return f"{options.path}: {total / 2e9:.2f} billion parameters in {len(blocks)} blocks, {total / 1e9:.2f} GB"


def empty(config) -> torch.nn.Module:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def parameters(config, blocks: int) -> int:
    """Of a model of so many blocks."""
    config.num_hidden_layers = blocks
    return sum(parameter.numel() for parameter in empty(config).parameters())


def drawn(config, block: str, seed: int):
    """(name, weight) of a block as its checkpoint has them, experts one by one; of what is outside for block ""."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in empty(config).named_parameters():
        inside = name.startswith("model.layers.")
        if name.startswith(f"{block}.") if block else not inside:
            for stored, shape in as_stored(name, tuple(parameter.shape)):
                scale = 1.0 if len(shape) < 2 else shape[-1] ** -0.5
                yield stored, torch.randn(shape, generator=draw).mul_(scale).bfloat16()


def as_stored(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The names and shapes of a parameter in a checkpoint: fused experts are there one by one."""
    owner, _, last = name.rpartition(".")
    if last == "gate_up_proj" and len(shape) == 3:
        half = (shape[1] // 2, shape[2])
        return [(f"{owner}.{e}.{one}_proj.weight", half) for e in range(shape[0]) for one in ("gate", "up")]
    if last == "down_proj" and len(shape) == 3:
        return [(f"{owner}.{e}.down_proj.weight", shape[1:]) for e in range(shape[0])]
    return [(name, shape)]


def run(options: argparse.Namespace) -> str:
    """One command for some seconds; the state after a SIGINT counts every layer that is stored."""
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder, "counts")
        command = [sys.executable, __file__, "counted", str(counts), str(options.model), options.command]
        command += ["--model", str(options.model), "--store", str(options.store)]
        if options.command == "covariance":
            command += ["--data", str(options.model / "text.jsonl"), "--block-by-block", "--moment", options.moment]
            command += ["--num-sequences", options.num_sequences, "--seq-len", options.seq_len]
            command += ["--memory-budget", options.memory_budget]
        else:
            metric = "full" if options.store.exists() else "identity"
            command += ["--rank", options.rank, "--solver", options.solver, "--metric", metric]
        begun = time.monotonic()
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        peak = read = 0
        while process.poll() is None:
            peak, read = told(process.pid, peak, read)
            if time.monotonic() - begun > options.seconds:
                process.send_signal(signal.SIGINT)
                process.wait()
            time.sleep(0.05)
        seconds = time.monotonic() - begun
        if process.returncode not in (0, 130):
            raise SystemExit(process.stderr.read())
        weights = int(counts.read_text())
    size = sum(file.stat().st_size for file in options.model.glob("*.safetensors"))
    return (
        f"{done(options)}, in {seconds:.0f} s\n"
        f"peak resident memory (VmHWM) {peak / 1e9:.2f} GB\n"
        f"read of the checkpoint {weights / 1e9:.3f} GB, {weights / size:.3f} of its size; rchar {read / 1e9:.3f} GB"
    )


def done(options: argparse.Namespace) -> str:
    """What is in the store."""
    store = prep.open_store(options.store)
    if options.command == "covariance":
        if store.status != "complete":
            return "stopped"
        return f"{len(store.moments)} layers calibrated on {store.corpus['tokens']:,} tokens"
    basis = store.bases.open(store.bases.names[-1])
    return f"{len(basis.layers)} of {len(basis.expected)} layers in metric {basis.name}"


def counted(counts: Path, model: str, command: list[str]) -> None:
    """Run a command of prep in this process, and write how many bytes of the model's tensors it read."""
    made: list[Tensors] = []
    begin = Tensors.__init__

    def recorded(self: Tensors, files: Iterable[str]) -> None:
        begin(self, files := list(files))
        if any(file.startswith(f"{model}/") for file in files):  # hidden states are read so, too
            made.append(self)

    Tensors.__init__ = recorded  # type: ignore[method-assign]
    try:
        cli.main(command)
    finally:
        counts.write_text(str(sum(one.bytes_read for one in made)))


def told(pid: int, peak: int, read: int) -> tuple[int, int]:
    """What the system says of a process by now: its peak resident memory and the bytes it has read."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        counts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        return 1024 * int(status["VmHWM"].split()[0]), int(counts["rchar"])
    except (OSError, KeyError, ValueError):  # it has just ended
        return peak, read


if __name__ == "__main__":
    main()
