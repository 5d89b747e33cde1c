"""Fine-tune SmolLM2 on GSM8K from a stored basis, with any published variant, under the Hugging Face Trainer.

python examples/train_gsm8k.py --model MODEL --store prep.zarr --data gsm8k_train.jsonl --variant antipasto_corda
python examples/train_gsm8k.py --model MODEL --store prep.zarr --data openai/gsm8k --subset main --variant lora_xs
python examples/train_gsm8k.py --model MODEL --store prep.zarr --data gsm8k_train.jsonl --variant lora --accuracy 64

The loss is over the answer's tokens. `lora` is PEFT's LoRA with its own start, on the layers of the store: what every
variant has to be compared with. One directory per run under --out holds the adapter and result.json.
"""

import json
import math
import re
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import click
import torch
from datasets import load_dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import prep

LEARNING_RATE = {"gain": 2e-2, "rotation": 5e-3, "ablation": 1e-2, "dplr": 2e-3, "arrow": 2e-3}
LEARNING_RATE |= {"dense": 1e-3, "lora": 2e-3}
LORA = {"core": "lora", "rank": 8}
PROMPT = "Question: {question}\nAnswer:"
NUMBER = re.compile(r"(?<![\d.])-?\d[\d,]*(?:\.\d+)?")
IGNORED = -100  # label of tokens that the loss leaves out


@click.command(context_settings={"show_default": True})
@click.option("--model", "model_id", required=True, help="Path or hub id of the model the store was made from.")
@click.option("--store", default="prep.zarr", help="Path or URL of the store.")
@click.option("--data", required=True, help="A .jsonl file or hub id with the columns question and answer.")
@click.option("--subset", help="Configuration of a hub data set.")
@click.option("--variant", type=click.Choice(["lora", *prep.VARIANTS]), default="antipasto_corda")
@click.option("--rank", type=int, help="Rank of the basis slice, or of LoRA.  [default: the variant's; 8 for lora]")
@click.option("--steps", default=60)
@click.option("--batch-size", default=4)
@click.option("--learning-rate", type=float, help="[default: by core]")
@click.option("--held-out", default=64, help="Rows kept for evaluation: the last ones of the data.")
@click.option("--max-length", default=256, help="Tokens per row.")
@click.option("--accuracy", default=0, help="Held-out questions to answer after training.")
@click.option("--new-tokens", default=256, help="Longest answer, in tokens.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option("--seed", default=0)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs"), help="Directory of the result directories."
)
def main(
    model_id: str,
    store: str,
    data: str,
    subset: str | None,
    variant: str,
    rank: int | None,
    steps: int,
    batch_size: int,
    learning_rate: float | None,
    held_out: int,
    max_length: int,
    accuracy: int,
    new_tokens: int,
    dtype: str,
    seed: int,
    out: Path,
) -> None:
    """Train one variant and print what it cost and what it gained."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_id, dtype=getattr(torch, dtype)).to(device)
    rows = load_rows(data, subset)
    train, test = (encode(part, tokenizer, max_length) for part in (rows[:-held_out], rows[-held_out:]))
    before = mean_losses(model, test, batch_size)

    begun = time.perf_counter()
    choices = (LORA if variant == "lora" else prep.VARIANTS[variant]) | ({"rank": rank} if rank else {})
    adapted, costs = start(model, store, choices)
    attached = time.perf_counter() - begun
    directory = out / f"{variant}-seed{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate or LEARNING_RATE[choices["core"]],
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        weight_decay=0.0,
        logging_steps=max(1, steps // 6),
        save_strategy="no",
        report_to=[],
        seed=seed,
        use_cpu=device == "cpu",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    Trainer(model=adapted, args=arguments, train_dataset=train, data_collator=collate).train()
    after = mean_losses(adapted, test, batch_size)
    result = {"variant": variant, **compared(before, after), **costs, "attach_seconds": attached}
    if accuracy:
        questions = rows[-held_out:][:accuracy]
        right = correct(adapted, tokenizer, questions, batch_size, new_tokens)
        result |= {"questions": len(questions), "accuracy": sum(right) / len(right)}
    result |= {**step_seconds(adapted, train[:batch_size]), "steps": steps, "batch_size": batch_size}
    result |= {"learning_rate": arguments.learning_rate, "rank": choices["rank"], "seed": seed, "dtype": dtype}
    if variant == "lora":
        prep.peft.save(adapted, directory)
    else:
        prep.save(model, directory / "adapter.safetensors")
    (directory / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, value in result.items():
        form = {float: ",.4g", int: ","}.get(type(value), "")
        print(f"{name:24} {value:{form}}")
    print(f"written to {directory}")


def start(model: Any, store: str, choices: dict[str, Any]) -> tuple[Any, dict[str, int]]:
    """The model with the chosen core, or with LoRA, and what that costs: parameters and multiply-adds per token."""
    if choices["core"] == "lora":
        rank = choices["rank"]
        adapted = prep.peft.get_model(model, store, "lora", r=rank, lora_alpha=rank, task_type="CAUSAL_LM")
        trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        return adapted, {"trainable": trainable, "multiply_adds_per_token": trainable}  # each weight is used once
    adapter = prep.attach(model, store, **choices)
    print(adapter)
    return model, {"trainable": adapter.trainable, "multiply_adds_per_token": adapter.multiply_adds}


def load_rows(data: str, subset: str | None = None) -> list[dict[str, str]]:
    """The rows of a .jsonl file or hub id, with the columns question and answer."""
    local = Path(data).exists()
    return list(
        load_dataset("json", data_files=data, split="train") if local else load_dataset(data, subset, split="train")
    )


def encode(rows: list[dict[str, str]], tokenizer: Any, max_length: int) -> list[dict[str, torch.Tensor]]:
    """Token ids and labels of the rows whose answer begins within max_length; questions do not count in the loss."""
    examples = []
    for row in rows:
        question = tokenizer(PROMPT.format_map(row))["input_ids"]
        answer = tokenizer(f" {row['answer']}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
        ids = torch.tensor((question + answer)[:max_length])
        labels = ids.clone()
        labels[: len(question)] = IGNORED
        if len(question) < len(ids):
            examples.append({"input_ids": ids, "labels": labels})
    return examples


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows padded on the right to one length."""
    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    labels = pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=IGNORED)
    mask = pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def answer_losses(model: Any, rows: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss over the answer (n,) and number of answer tokens (n,) of each row."""
    batch = {key: value.to(model.device) for key, value in collate(rows).items()}
    labels = batch.pop("labels")[:, 1:]
    first = int((labels != IGNORED).any(0).nonzero()[0])
    labels = labels[:, first:]
    logits = model(**batch, logits_to_keep=labels.shape[1] + 1).logits[:, :-1].float()  # of what is predicted only
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    return loss.sum(1), (labels != IGNORED).sum(1)


@torch.no_grad()
def row_losses(model: Any, rows: list[dict[str, torch.Tensor]], batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`answer_losses` of any number of rows, on the CPU: float64 (n,) and int64 (n,)."""
    model.eval()
    pairs = [answer_losses(model, rows[at : at + batch_size]) for at in range(0, len(rows), batch_size)]
    losses, tokens = (torch.cat(column).cpu() for column in zip(*pairs, strict=True))
    return losses.double(), tokens


def mean_losses(model: Any, rows: list[dict[str, torch.Tensor]], batch_size: int) -> torch.Tensor:
    """Mean loss per answer token of each row (n,), float64."""
    losses, tokens = row_losses(model, rows, batch_size)
    return losses / tokens


def compared(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """Mean losses before and after (n,), and how many standard errors of the paired difference lie between them."""
    gain = before - after
    errors = (gain.mean() / (gain.std() / math.sqrt(len(gain)))).item()
    return {"loss_before": before.mean().item(), "loss_after": after.mean().item(), "standard_errors": errors}


@torch.no_grad()
def correct(
    model: Any, tokenizer: Any, rows: list[dict[str, str]], batch_size: int, new_tokens: int = 256
) -> list[bool]:
    """Whether the greedy answer to each question ends in the right number."""
    model.eval()
    right = []
    for at in range(0, len(rows), batch_size):
        batch = rows[at : at + batch_size]
        prompts = tokenizer(
            [PROMPT.format_map(row) for row in batch], return_tensors="pt", padding=True, padding_side="left"
        ).to(model.device)
        written = model.generate(
            input_ids=prompts["input_ids"],
            attention_mask=prompts["attention_mask"],
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )[:, prompts["input_ids"].shape[1] :]
        answers = tokenizer.batch_decode(written, skip_special_tokens=True)
        pairs = (
            (final_number(answer), final_number(row["answer"])) for answer, row in zip(answers, batch, strict=True)
        )
        right += [found is not None and found == wanted for found, wanted in pairs]
    return right


def final_number(answer: str) -> Decimal | None:
    """The number after the first `####`, or the last one of an answer without it; None where there is none."""
    _, marked, end = answer.partition("####")
    found = NUMBER.findall(end if marked else answer)
    return Decimal(found[0 if marked else -1].replace(",", "")) if found else None


def step_seconds(model: torch.nn.Module, rows: list[dict[str, torch.Tensor]], repeats: int = 3) -> dict[str, float]:
    """Median time of one forward and one backward over a training batch."""
    batch = {key: value.to(model.device) for key, value in collate(rows).items()}
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        loss = model(**batch).loss
        middle = time.perf_counter()
        loss.backward()
        times.append((middle - begun, time.perf_counter() - middle))
        model.zero_grad()
    forward, backward = (sorted(column)[repeats // 2] for column in zip(*times, strict=True))
    return {"forward_seconds": forward, "backward_seconds": backward}


if __name__ == "__main__":
    main()
