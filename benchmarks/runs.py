"""One run of a sweep: the rows and the store that it shares with all others, its training, its line of results."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from outcomes import Run
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import prep

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from train_gsm8k import IGNORED, answer_losses, correct, encode, load_rows

PUBLISHED = {"full": "whitened", "diagonal": "asvd", "identity": "pissa", "identity-activation": "antipasto"}
OTHER_LENGTH = 128  # tokens of a sequence of the other domain
REPAIRS = {"repair": "full", "loftq": "identity"}  # the metric in which these take the error of a quantised base


@dataclass(frozen=True)
class Options:
    """What every run of a sweep has in common."""

    model: str
    data: str
    subset: str | None
    evaluation: str | None
    work: Path
    calibration_rows: int
    calibration_sequences: int
    calibration_length: int
    evaluation_rows: int
    other_sequences: int
    steps: int
    batch_size: int
    max_length: int
    accuracy: int
    dtype: str
    device: str
    threads: int
    base: str
    every: int

    @property
    def store(self) -> Path:
        return self.work / "prep.zarr"

    @property
    def lines(self) -> Path:
        return self.work / "runs.jsonl"


@dataclass(frozen=True)
class Parts:
    """The rows of each use, and the encoded ones that runs take."""

    tokenizer: Any
    calibration: list[dict[str, str]]
    training: list[dict[str, str]]
    evaluation: list[dict[str, str]]
    encoded: dict[str, list[dict[str, torch.Tensor]]]  # training, evaluation, other


# Data and store


def deal(options: Options) -> Parts:
    """Rows for calibration, training and evaluation, checked to be apart, and text of another domain."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = load_rows(options.data, options.subset)
    calibration, rows = rows[: options.calibration_rows], rows[options.calibration_rows :]
    if options.evaluation:
        held = fitting(load_rows(options.evaluation), tokenizer, options)[: options.evaluation_rows]
        training = fitting(rows, tokenizer, options)
    else:
        rows = fitting(rows, tokenizer, options)
        training, held = rows[: -options.evaluation_rows], rows[-options.evaluation_rows :]
    check_disjoint(calibration=calibration, training=training, evaluation=held)
    encoded = {
        name: encode(part, tokenizer, options.max_length)
        for name, part in (("training", training), ("evaluation", held))
    }
    return Parts(tokenizer, calibration, training, held, encoded | {"other": other_text(options, tokenizer)})


def fitting(rows: list[dict[str, str]], tokenizer: Any, options: Options) -> list[dict[str, str]]:
    """The rows that have at most max_length tokens, so that no answer is cut."""
    longer = encode(rows, tokenizer, 1 << 30)
    return [row for row, full in zip(rows, longer, strict=True) if len(full["input_ids"]) <= options.max_length]


def question_hash(row: dict[str, str]) -> str:
    """Of a row's question, whatever its case and spaces."""
    return hashlib.sha256(" ".join(row["question"].split()).casefold().encode()).hexdigest()


def check_disjoint(**parts: list[dict[str, str]]) -> None:
    """SystemExit that names a row which is in two parts, or a part that is empty."""
    seen: dict[str, str] = {}
    for name, rows in parts.items():
        if not rows:
            raise SystemExit(f"no row is left for {name}: give more data, or take fewer rows for the other parts")
        for row in rows:
            if seen.setdefault(question_hash(row), name) != name:
                raise SystemExit(
                    f"a row is in {seen[question_hash(row)]} and in {name}: {row['question'][:60]!r}; "
                    "take it out of one of the files"
                )


def other_text(options: Options, tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """Sequences at even distances in the help texts that come with Python; every token counts in the loss."""
    topics = importlib.import_module("pydoc_data.topics").topics
    ids = tokenizer("\n".join(topics[key] for key in sorted(topics)), return_tensors="pt")["input_ids"][0]
    apart = len(ids) // options.other_sequences
    sequences = [ids[at * apart :][: min(OTHER_LENGTH, options.max_length)] for at in range(options.other_sequences)]
    return [{"input_ids": sequence, "labels": sequence} for sequence in sequences]


def calibrated(options: Options, file: Path) -> Any:
    return prep.covariance(
        options.model,
        str(file),
        store=options.store,
        template="Question: {question}\nAnswer: {answer}",
        num_sequences=options.calibration_sequences,
        seq_len=options.calibration_length,
        dtype="float32",
        quiet=True,
    )


def decomposed(options: Options, methods: Sequence[str], rank: int) -> None:
    """Every basis that the methods start from, anew where it holds too few ranks; EVA redistributes up to twice r."""
    for method in methods:
        if method in ("lora", "dora"):
            continue
        name = basis_of(method, options)
        reach = rank * (2 if method == "eva" else 1)
        known = prep.open_store(options.store).bases
        short = name in known and known[name].method["rank"] < reach
        wanted: dict[str, Any] = {"for_": PUBLISHED.get(name, method)}
        if method in REPAIRS:
            wanted = {"repair": options.base, "metric": REPAIRS[method]}
        prep.decompose(options.store, rank=reach, overwrite=short, quiet=True, **wanted)


def basis_of(method: str, options: Options) -> str:
    """The name of the basis that a method starts from."""
    if method in REPAIRS:
        return f"repair-{options.base}" + ("" if REPAIRS[method] == "full" else f"-{REPAIRS[method]}")
    return method.split(":")[1] if ":" in method else prep.peft.INITS[method]


def described(rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    content = hashlib.sha256(b"".join(row["input_ids"].numpy().tobytes() for row in rows)).hexdigest()
    return {"rows": len(rows), "tokens": sum(len(row["input_ids"]) for row in rows), "hash": content[:16]}


# One run


def train(run: Run, parts: Parts, options: Options) -> dict[str, Any]:
    """Start, train, evaluate; the run's line."""
    begun = time.perf_counter()
    model = loaded(options)
    torch.manual_seed(run.seed)
    start, (model, parameters, costs) = seconds(options.device, lambda: started(run, model, options))
    order = batches(len(parts.training), run.seed, options)
    optimizer = torch.optim.AdamW(parameters, lr=run.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share(step, options.steps))
    model.train()
    steps, course = [], {}
    for number, indices in enumerate(order):
        if options.every and number % options.every == 0:
            course[number] = round(sum(row_losses(model, parts, "evaluation", options)), 3)
            model.train()
        batch = [parts.encoded["training"][index] for index in indices]
        steps.append(seconds(options.device, lambda batch=batch: step(model, batch, parameters, optimizer))[0])
        schedule.step()
    line = {"kind": "run", **asdict(run), **costs, "start": start, "step": sorted(steps)[len(steps) // 2]}
    line |= evaluated(model, parts, options) | ({"course": course} if course else {})
    if options.accuracy:
        answered = parts.evaluation[: options.accuracy]
        line |= {"asked": len(answered), "right": sum(correct(model, parts.tokenizer, answered, options.batch_size))}
    return line | {"wall": round(time.perf_counter() - begun, 1)}


def started(run: Run, model: Any, options: Options) -> tuple[Any, list[torch.nn.Parameter], dict[str, int]]:
    """The model as a user would make it, its trainable parameters, and what they add to every token."""
    if ":" in run.method:
        core, basis, *rotate = run.method.split(":")
        choices = {"rotate": rotate[0]} if rotate else {}
        adapter = prep.attach(model, options.store, core=core, basis=basis, rank=run.rank, **choices)
        costs = {"trainable": adapter.trainable, "multiply_adds": adapter.multiply_adds}
        return model, list(adapter.parameters()), costs
    init, more = run.method, {}
    if init == "dora":
        init, more = "lora", {"use_dora": True}
    elif init in REPAIRS:
        init, more = "repair", {"basis": basis_of(run.method, options)}
    model = prep.peft.get_model(
        model, options.store, init, r=run.rank, lora_alpha=run.rank, task_type="CAUSAL_LM", **more
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainable = sum(parameter.numel() for parameter in parameters)
    return model, parameters, {"trainable": trainable, "multiply_adds": trainable}  # each weight is used once a token


def step(model: Any, batch: list[dict[str, torch.Tensor]], parameters: Any, optimizer: Any) -> None:
    """One update by the mean loss per answer token, with Trainer's clipping."""
    losses, tokens = answer_losses(model, batch)
    (losses.sum() / tokens.sum()).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def batches(rows: int, seed: int, options: Options) -> list[list[int]]:
    """The rows of every step: each row once before any comes again, in an order that only the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    needed = options.steps * options.batch_size
    drawn = torch.cat([torch.randperm(rows, generator=generator) for _ in range(-(-needed // rows))])
    return drawn[:needed].view(options.steps, options.batch_size).tolist()


def share(step: int, steps: int) -> float:
    """Of the learning rate: a tenth of the steps rising, then falling to a tenth as a cosine."""
    rising = max(1, steps // 10)
    if step < rising:
        return (step + 1) / rising
    return 0.55 + 0.45 * torch.cos(torch.tensor(torch.pi * (step - rising) / max(1, steps - rising))).item()


def evaluated(model: Any, parts: Parts, options: Options) -> dict[str, list[float]]:
    """Summed loss of every held-out row, and of every sequence of the other text."""
    names = {"losses": "evaluation", "other_losses": "other"}
    found = {name: row_losses(model, parts, part, options) for name, part in names.items()}
    return {name: [round(loss, 3) for loss in losses] for name, losses in found.items()}


@torch.no_grad()
def row_losses(model: Any, parts: Parts, part: str, options: Options) -> list[float]:
    """Summed loss of every row of a part."""
    rows, size = parts.encoded[part], options.batch_size
    model.train(options.base != "float")  # in evaluation mode bitsandbytes repacks its weights on some CPUs
    return [loss for at in range(0, len(rows), size) for loss in answer_losses(model, rows[at : at + size])[0].tolist()]


def counted(parts: Parts) -> dict[str, list[int]]:
    """How many tokens each of these losses is of."""
    names = {"tokens": "evaluation", "other_tokens": "other"}
    return {
        name: [int((row["labels"][1:] != IGNORED).sum()) for row in parts.encoded[part]] for name, part in names.items()
    }


def loaded(options: Options, base: str | None = None) -> Any:
    """The base model, quantised as the options say, or as `base` does."""
    dtype, base = getattr(torch, options.dtype), base or options.base
    if base == "float":
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(options.device)
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=base, bnb_4bit_compute_dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(
        options.model, dtype=dtype, quantization_config=packing, device_map=options.device
    )


def seconds(device: str, task: Any) -> tuple[float, Any]:
    """How long the task took, on CPUs in processor time, and its result."""
    gpu = device != "cpu"
    clock = time.perf_counter if gpu else time.process_time
    begun = clock()
    result = task()
    if gpu:
        torch.cuda.synchronize()
    return round(clock() - begun, 3), result


# Runs side by side

_common: tuple[Parts, Options]  # of a worker process


@contextlib.contextmanager
def workers(options: Options, parts: Parts, processes: int) -> Iterator[Callable[[list[Run], float], Iterable[Any]]]:
    """A function of runs and a time, which gives lines as runs end and begins none after the time."""
    if processes == 1:
        begin(options, parts)
        yield lambda wave, end: filter(None, (train_until(run, end) for run in wave))
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), begin, (options,))

    def run_all(wave: list[Run], end: float) -> Iterable[Any]:
        futures = [pool.submit(train_until, run, end) for run in wave]
        return filter(None, (future.result() for future in as_completed(futures)))

    try:
        yield run_all
    finally:
        pool.shutdown(cancel_futures=True)


def begin(options: Options, parts: Parts | None = None) -> None:
    """Make a process ready for runs; a worker ends with the process that began it, however that ends."""
    global _common
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(options.threads)
    importlib.import_module("peft")  # so that no run's start counts it
    _common = parts or deal(options), options


def train_until(run: Run, end: float) -> dict[str, Any] | None:
    """The run's line; None where it is too late to begin."""
    return train(run, *_common) if time.monotonic() < end else None
