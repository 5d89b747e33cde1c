"""`prep decompose` of a model that need not fit into memory: peak resident memory, bytes read, and time.

    python benchmarks/large.py make llama --billions 3 --path /tmp/llama
    python benchmarks/large.py run --model /tmp/llama --rank 16 --seconds 300

`make` writes a Llama, or a mixture of experts of Qwen3's kind, with random bfloat16 weights, one block per safetensors
file, of which one is in memory at a time; delete the folder afterwards. `run` decomposes it in metric identity in a
process of its own, stopped after `--seconds`, and prints what that process took: VmHWM, which counts mapped files,
too, and the reads of its system calls (rchar), beside the bytes of the layers that were done.
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
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import prep

SIZES = {"vocab_size": 32000, "tie_word_embeddings": True, "max_position_embeddings": 4096}
LLAMA = {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8}
MOE = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4, "num_experts": 32}
MOE |= {"moe_intermediate_size": 768, "num_experts_per_tok": 4, "intermediate_size": 768, "head_dim": 128}
KINDS = {"llama": ("llama", LLAMA), "moe": ("qwen3_moe", MOE)}


def main() -> None:
    """Make a checkpoint, or decompose one."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = asked.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("kind", choices=KINDS)
    making.add_argument("--billions", type=float, default=3.0, help="parameters, about")
    making.add_argument("--path", type=Path, required=True)
    making.add_argument("--shrink", type=int, default=1, help="divide every width by this")
    running = commands.add_parser("run")
    running.add_argument("--model", type=Path, required=True)
    running.add_argument("--rank", default="16")
    running.add_argument("--seconds", type=float, default=math.inf)
    running.add_argument("--solver", default="randomized")
    options = asked.parse_args()
    print(make(options) if options.command == "make" else run(options))


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
    """Decompose for some seconds; the state after a SIGINT counts every layer that is stored."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/s"
        command = [sys.executable, "-m", "prep.cli", "decompose", "--metric", "identity", "--model", str(options.model)]
        command += ["--rank", options.rank, "--solver", options.solver, "--store", store]
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
        basis = prep.open_store(store).bases.open("identity")
        done = 2 * sum(math.prod(record.shape) for record in basis.layers.values())  # bytes in bfloat16
    return (
        f"{len(basis.layers)} of {len(basis.expected)} layers, {done / 1e9:.3f} GB of weights, in {seconds:.0f} s\n"
        f"peak resident memory (VmHWM) {peak / 1e9:.2f} GB\n"
        f"read {read / 1e9:.3f} GB (rchar, with Python's own files), {read / max(done, 1):.3f} of the weights"
    )


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
