"""Families of models, tiny and built from their configurations, with data for each and an oracle for fused experts."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import tiny
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

SENTENCES = tiny.texts(24, shortest=2, longest=15)
TOKENS = {"vocab_size": tiny.SIZE, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
DENSE = {**TOKENS, **SIZES, "intermediate_size": 48}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
ROUTED = {**TOKENS, **SIZES, **HEADS, "intermediate_size": 24, "num_experts_per_tok": 2}
GPT2 = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {**TOKENS, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
VIT = {**SIZES, "intermediate_size": 48, "image_size": 16, "patch_size": 4, "num_labels": 5}


@dataclass(frozen=True)
class Family:
    """How a tiny model of two blocks is made: model type, class, configuration; side: of padding."""

    kind: str
    auto: str
    config: dict[str, Any]
    side: str = "right"


FAMILIES = {
    "Llama": Family("llama", "AutoModelForCausalLM", {**DENSE, "num_key_value_heads": 2}, "left"),
    "Qwen3": Family("qwen3", "AutoModelForCausalLM", {**DENSE, **HEADS}),
    "Gemma 3": Family("gemma3_text", "AutoModelForCausalLM", {**DENSE, **HEADS, "sliding_window": 8}),
    "Mistral": Family("mistral", "AutoModelForCausalLM", {**DENSE, **HEADS, "sliding_window": 8}, "left"),
    "GPT-2": Family("gpt2", "AutoModelForCausalLM", GPT2),
    "Phi": Family("phi", "AutoModelForCausalLM", DENSE),
    "OPT": Family("opt", "AutoModelForCausalLM", {**DENSE, "word_embed_proj_dim": 32, "ffn_dim": 48}, "left"),
    "BERT": Family("bert", "AutoModelForMaskedLM", DENSE),
    "ViT": Family("vit", "AutoModelForImageClassification", VIT),
    "T5": Family("t5", "AutoModelForSeq2SeqLM", T5),
    "Mixtral": Family("mixtral", "AutoModelForCausalLM", {**ROUTED, "num_local_experts": 4}, "left"),
    "Qwen3-MoE": Family("qwen3_moe", "AutoModelForCausalLM", {**ROUTED, "moe_intermediate_size": 16, "num_experts": 8}),
    "GPT-OSS": Family("gpt_oss", "AutoModelForCausalLM", {**ROUTED, "num_local_experts": 4, "rope_parameters": None}),
    "Llama 4": Family("llama4_text", "AutoModelForCausalLM", {**ROUTED, "num_local_experts": 4}),
}


def build(family: Family) -> Any:
    """A model with random biases, and weights large enough to matter."""
    torch.manual_seed(0)
    model = getattr(transformers, family.auto).from_config(AutoConfig.for_model(family.kind, **family.config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or parameter.ndim > 1:
                parameter.normal_(std=0.5 if "bias" in name else 0.2)
    return model


def padded(rows: list[list[int]], side: str = "right") -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, T)."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        real = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[i, real], mask[i, real] = torch.tensor(row), 1
    return ids, mask


def inputs(name: str, size: int) -> list[dict[str, Tensor]]:
    """The family's data in batches of `size`, with labels; T5 answers a sentence by another one."""
    family, rows = FAMILIES[name], [tiny.ids(text) for text in SENTENCES]
    if name == "ViT":
        pixels = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(24) % 5
        return [{"pixel_values": pixels[i : i + size], "labels": labels[i : i + size]} for i in range(0, 24, size)]
    batches = []
    for first in range(0, 24, size):
        ids, mask = padded(rows[first : first + size], family.side)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        if name == "T5":
            answers, mask = padded(rows[::-1][first : first + size])
            batch |= {"decoder_input_ids": answers, "decoder_attention_mask": mask}
            batch["labels"] = answers.masked_fill(mask == 0, -100)
        elif name != "BERT":
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        batches.append(batch)
    return batches


def without(batch: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != key}


class Routed:
    """What every fused expert is given, computed by hand from what its module is called with: `[layer]` (tokens, d)."""

    def __init__(self, model: Any, batches: list[dict[str, Tensor]]):
        self.kept: dict[str, list[np.ndarray]] = {}
        modules = {name: module for name, module in model.named_modules() if name.endswith("mlp.experts")}
        handles = [
            module.register_forward_pre_hook(lambda m, args, name=name: self.note(name, m, *args[:2]))
            for name, module in modules.items()
        ]
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        for handle in handles:
            handle.remove()

    def note(self, name: str, module: Any, hidden: Tensor, chosen: Tensor) -> None:
        for expert in chosen.unique().tolist():
            X = hidden[(chosen == expert).any(1)].double()
            W = module.gate_up_proj[expert].double()
            if hasattr(module, "limit"):  # GPT-OSS: weights transposed, biases, gate and up interleaved
                y = X @ W + module.gate_up_proj_bias[expert].double()
                gate, up = y[:, ::2].clamp(max=module.limit), y[:, 1::2].clamp(-module.limit, module.limit)
                h = (up + 1) * gate * torch.sigmoid(gate * module.alpha)
            else:
                gate, up = (X @ W.T).chunk(2, -1)
                h = gate * torch.sigmoid(gate) * up
            for projection, rows in (("gate_up_proj", X), ("down_proj", h)):
                self.kept.setdefault(f"{name}.{expert}.{projection}", []).append(rows.numpy())

    def __getitem__(self, layer: str) -> np.ndarray:
        return np.concatenate(self.kept[layer])
