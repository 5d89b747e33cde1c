"""Data for every family of tiny models, and an oracle for fused experts."""

from typing import Any

import numpy as np
import tiny
import torch
from tiny import FAMILIES
from torch import Tensor

SENTENCES = tiny.texts(24, shortest=2, longest=15)


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
