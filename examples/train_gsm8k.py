"""Fine-tune SmolLM2 on GSM8K from a stored basis, with any published variant, under the Hugging Face Trainer.

python examples/train_gsm8k.py --model MODEL --store prep.zarr --data gsm8k_train.jsonl --variant antipasto_corda
python examples/train_gsm8k.py --model MODEL --store prep.zarr --data openai/gsm8k --subset main --variant lora_xs

The loss is over the answer's tokens. One directory per run under --out holds the adapter and result.json.
"""

import json
import math
import time
from pathlib import Path

import click
import torch
from datasets import load_dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import prep

LEARNING_RATE = {"gain": 2e-2, "rotation": 5e-3, "ablation": 1e-2, "dplr": 2e-3, "arrow": 2e-3, "dense": 1e-3}
IGNORED = -100  # label of tokens that the loss leaves out


@click.command(context_settings={"show_default": True})
@click.option("--model", "model_id", required=True, help="Path or hub id of the model the store was made from.")
@click.option("--store", default="prep.zarr", help="Path or URL of the store.")
@click.option("--data", required=True, help="A .jsonl file or hub id with the columns question and answer.")
@click.option("--subset", help="Configuration of a hub data set.")
@click.option("--variant", type=click.Choice(list(prep.VARIANTS)), default="antipasto_corda")
@click.option("--rank", type=int, help="Rank of the basis slice.  [default: the variant's]")
@click.option("--steps", default=60)
@click.option("--batch-size", default=4)
@click.option("--learning-rate", type=float, help="[default: by core]")
@click.option("--held-out", default=64, help="Rows kept for evaluation: the last ones of the data.")
@click.option("--max-length", default=256, help="Tokens per row.")
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
    dtype: str,
    seed: int,
    out: Path,
) -> None:
    """Train one variant and print what it cost and what it gained."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    model = AutoModelForCausalLM.from_pretrained(model_id, dtype=getattr(torch, dtype))
    rows = read_rows(data, subset, tokenizer, max_length)
    train, test = rows[:-held_out], rows[-held_out:]

    begun = time.perf_counter()
    choices = prep.VARIANTS[variant] | ({"rank": rank} if rank else {})
    adapter = prep.attach(model, store, **choices)
    attached = time.perf_counter() - begun
    print(adapter)

    with adapter.coeff(0.0):
        before = row_losses(model, test, batch_size)
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
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=train, data_collator=collate).train()
    after = row_losses(model, test, batch_size)

    gain = before - after
    result = {
        "variant": variant,
        "loss_before": before.mean().item(),
        "loss_after": after.mean().item(),
        "standard_errors": (gain.mean() / (gain.std() / math.sqrt(len(gain)))).item(),
        "trainable": adapter.trainable,
        "multiply_adds_per_token": adapter.multiply_adds,
        "attach_seconds": attached,
        **step_seconds(model, train[:batch_size]),
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": arguments.learning_rate,
        "rank": choices["rank"],
        "seed": seed,
        "dtype": dtype,
    }
    prep.save(model, directory / "adapter.safetensors")
    (directory / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, value in result.items():
        print(
            f"{name:24} {value:,.4g}"
            if isinstance(value, float)
            else f"{name:24} {value:,}"
            if isinstance(value, int)
            else f"{name:24} {value}"
        )
    print(f"written to {directory}")


def read_rows(data: str, subset: str | None, tokenizer, max_length: int) -> list[dict[str, torch.Tensor]]:
    """Token ids and labels of every row; the question's labels are ignored by the loss."""
    local = Path(data).exists()
    rows = load_dataset("json", data_files=data, split="train") if local else load_dataset(data, subset, split="train")
    examples = []
    for row in rows:
        question = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
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


@torch.no_grad()
def row_losses(model: torch.nn.Module, rows: list[dict[str, torch.Tensor]], batch_size: int) -> torch.Tensor:
    """Mean loss per answer token of each row (n,), float64."""
    model.eval()
    losses = []
    for start in range(0, len(rows), batch_size):
        batch = {key: value.to(model.device) for key, value in collate(rows[start : start + batch_size]).items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        losses.append((loss.sum(1) / (labels != IGNORED).sum(1)).double().cpu())
    return torch.cat(losses)


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
