"""Tiny models, tokenizers and texts for the pipeline's tests, and plain readings of what a store must then hold."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

SPECIAL = ["<pad>", "<unk>", "<end>"]
WORDS = [f"w{i}" for i in range(60)]
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
SIZE = 64  # rows of every embedding


def tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    """One token per word."""
    words = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side=padding_side, **names)


def texts(count: int, shortest: int = 3, longest: int = 14, seed: int = 0) -> list[str]:
    """Sentences of `shortest` to `longest` words."""
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(shortest, longest + 1))) for _ in range(count)]


def ids(text: str) -> list[int]:
    return [VOCABULARY[word] for word in text.split()]


def write_data(path: Path, sentences: list[str]) -> str:
    """A .jsonl file with the columns `text` and `number`; its name."""
    rows = [{"text": text, "number": i} for i, text in enumerate(sentences)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# Models: two blocks, random biases (a fresh model has none that differ from zero), weights large enough to matter

HIDDEN = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(intermediate: int = 48) -> Any:
    sizes = {**HIDDEN, "intermediate_size": intermediate, "num_key_value_heads": 2}
    return _model(AutoModelForCausalLM, "llama", max_position_embeddings=64, **sizes)


def gpt2() -> Any:
    return _model(AutoModelForCausalLM, "gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64)


def phi() -> Any:
    return _model(AutoModelForCausalLM, "phi", max_position_embeddings=64, **HIDDEN)


def bert() -> Any:
    return _model(AutoModelForMaskedLM, "bert", max_position_embeddings=64, **HIDDEN)


def roberta() -> Any:
    return _model(AutoModelForMaskedLM, "roberta", max_position_embeddings=64, **HIDDEN)


def opt() -> Any:
    return _model(AutoModelForCausalLM, "opt", max_position_embeddings=64, word_embed_proj_dim=32, ffn_dim=48, **HIDDEN)


def t5() -> Any:
    return _model(AutoModelForSeq2SeqLM, "t5", d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4)


def _model(auto: Any, kind: str, **sizes: int) -> Any:
    torch.manual_seed(0)
    tokens = {"vocab_size": SIZE, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}
    model = auto.from_config(AutoConfig.for_model(kind, **tokens, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif parameter.ndim == 2:
                parameter.normal_(std=0.15)
    return model


def save(model: Any, path: Path, padding_side: str = "right") -> str:
    """Model and tokenizer in a directory; its name."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model.save_pretrained(path)
    if bars:
        logging.enable_progress_bar()
    tokenizer(padding_side).save_pretrained(path)
    return str(path)


# Oracles


def is_linear(module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D", "NonDynamicallyQuantizableLinear")


def weight(module: Any) -> np.ndarray:
    """W (d_out, d_in), float64."""
    W = module.weight.detach().double().numpy()
    return W.T if type(module).__name__ == "Conv1D" else W


class Activations:
    """The inputs of every linear layer, kept as they came: `[layer]` is (tokens, d_in) in float64."""

    def __init__(self, model: nn.Module, batches: list[dict[str, Tensor]]):
        kept: dict[str, list[np.ndarray]] = {}
        mask: Tensor | None = None

        def keep(name: str):
            def hook(_module, args, kwargs):
                x = args[0] if args else kwargs["hidden_states"]
                rows = x.reshape(-1, x.shape[-1])
                real = rows if mask is None or mask.numel() != len(rows) else rows[mask.reshape(-1).bool()]
                kept.setdefault(name, []).append(real.double().numpy())

            return hook

        handles = [
            module.register_forward_pre_hook(keep(name), with_kwargs=True)
            for name, module in model.named_modules()
            if is_linear(module)
        ]
        with torch.no_grad():
            for batch in batches:
                mask = batch.get("attention_mask")
                model(**batch)
        for handle in handles:
            handle.remove()
        self._kept = {name: np.concatenate(parts) for name, parts in kept.items()}

    def __getitem__(self, layer: str) -> np.ndarray:
        return self._kept[layer]


def relative(got, wanted: np.ndarray) -> float:
    """Relative Frobenius error."""
    return float(np.linalg.norm(np.asarray(got, dtype=np.float64) - wanted) / np.linalg.norm(wanted))


def contents(path: Path | str) -> dict[str, bytes]:
    """Every file under a directory."""
    return {str(file.relative_to(path)): file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}
