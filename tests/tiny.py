"""The one builder of tiny models, texts and stores, and plain readings of what a store must then hold."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from prep.linear import layer_shape, weight_hash, weight_matrix
from prep.store import BasisWriter, LayerRecord, MomentWriter, begin_moments, create_store
from prep.store.format.schema import put_attributes
from prep.store.moment_writer import seal_sites

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

TOKENS = {"vocab_size": SIZE, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}
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


def model(family: str | Family, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A model of a family in evaluation mode. config: what differs from the family's own configuration."""
    if isinstance(family, str):
        family = FAMILIES[family]
    torch.manual_seed(seed)
    settings = AutoConfig.for_model(family.kind, **family.config | config)
    net = getattr(transformers, family.auto).from_config(settings).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "bias" in name or parameter.ndim > 1:
                parameter.normal_(std=0.5 if "bias" in name else 0.2)
    return net.to(dtype)


def llama(intermediate: int = 48, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The model that most tests take: hidden 32, 4 heads (2 of keys), 64 tokens."""
    return model("Llama", seed, dtype, intermediate_size=intermediate)


def layers(net: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer but the head."""
    return {name: module for name, module in net.named_modules() if is_linear(module) and name != "lm_head"}


def wide(seed: int = 0) -> Any:
    """A Llama whose layers bitsandbytes can pack, several blocks in a row: hidden 64, the widest input 192."""
    return model("Llama", seed, hidden_size=64, intermediate_size=192)


def packed(directory: str, kind: str = "nf4", **settings: Any) -> Any:
    """A saved model with its layers packed by bitsandbytes as it is loaded: nf4, fp4 or int8."""
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": torch.float32}
    given = {"load_in_8bit": True} if kind == "int8" else four
    config = transformers.BitsAndBytesConfig(**given, **settings)
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=config, device_map="cpu", dtype=torch.float32
    ).eval()


def int8(layer: nn.Linear) -> Any:
    """The layer as bitsandbytes packs it; the test is skipped where that is not installed."""
    d_out, d_in = layer.weight.shape
    packed = pytest.importorskip("bitsandbytes").nn.Linear8bitLt(d_in, d_out, bias=False, has_fp16_weights=False)
    packed.load_state_dict(layer.state_dict())
    return packed.to("cpu")


def with_int8_up_projections(net: Any) -> Any:
    """The model, whose up projections are packed."""
    for block in net.model.layers:
        block.mlp.up_proj = int8(block.mlp.up_proj)
    return net


def save(model: Any, path: Path, padding_side: str = "right") -> str:
    """Model and tokenizer in a directory; its name."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model.save_pretrained(path)
    if bars:
        logging.enable_progress_bar()
    tokenizer(padding_side).save_pretrained(path)
    return str(path)


# Stores

RUN = {"num_sequences": 8, "seq_len": 16, "batch_size": 4, "quiet": True}  # a calibration of two batches


def sources(path: Path, net: Any = None, sentences: int = 60, padding_side: str = "right") -> SimpleNamespace:
    """What `prep covariance` takes: a saved `model` (a Llama by default) and `data`, in the directory `path`."""
    directory = save(llama() if net is None else net, path / "model", padding_side)
    return SimpleNamespace(path=path, model=directory, data=write_data(path / "text.jsonl", texts(sentences)))


METHODS = {  # of the bases in the stores that are not calibrated
    "full": {"metric": "full", "power": 0.5, "select": "top"},
    "diagonal": {"metric": "diagonal", "power": 0.5, "select": "top"},
    "identity": {"metric": "identity", "power": 0.5, "select": "top"},
    "identity-activation": {"metric": "identity", "power": 0.5, "select": "activation"},
    "eva": {"metric": "components", "power": 0.5, "select": "top"},
}


def store(path: Path, net: nn.Module, names: tuple[str, ...] = ("full",), rank: int = 16, shares: bool = True) -> Path:
    """A store with the named bases of the model's layers, for random second moments; computed in float64.

    shares: the bases say what their directions keep.
    """
    model_attrs = {"id": "tiny", "revision": None, "class": "Tiny", "config_hash": "0", "dtype": "float32"}
    members = layers(net)
    first = weight_hash(weight_matrix(next(iter(members.values()))))
    attrs = {"id": f"{path.name}-{first}", "model": model_attrs, "corpus": None, "options": None}
    root = create_store(path, {**attrs, "status": "complete", "prep_version": "0", "run": {}}).root
    for name in names:
        write_basis(root, name, members, rank, model_attrs, shares)
    return path


def write_basis(root, name: str, members: dict[str, nn.Module], rank: int, model_attrs: dict, shares: bool) -> None:
    rng = np.random.default_rng(0)
    groups: dict = {}
    for layer, module in members.items():
        shape = layer_shape(module)
        sizes = {"rank": min(rank, *shape), "spectrum": min(shape), "shares": ["kept"] if shares else []}
        group = groups.setdefault(shape, {"layers": [], **sizes})
        group["layers"].append(layer)
    method = {**METHODS.get(name, METHODS["full"]), "rank": rank}
    writer = BasisWriter.create(root, name, method=method, dtype="float32", model=model_attrs, groups=groups)
    for layer, module in members.items():
        W = weight_matrix(module).double().numpy()
        U, S, P, spectrum = svd_basis(W, method, rank, rng)
        shape = layer_shape(module)
        record = LayerRecord(
            shape=shape,
            index=groups[shape]["layers"].index(layer),
            rank=len(S),
            energy=float((S**2).sum() / (spectrum**2).sum()),
            tail=0.0,
            numerical_rank=len(S),
            solver="exact",
            bound=1.0,
            weight_hash=weight_hash(weight_matrix(module)),
            weight_dtype=str(weight_matrix(module).dtype).removeprefix("torch."),
        )
        arrays = (torch.from_numpy(np.ascontiguousarray(part)) for part in (U, S, P, spectrum))
        kept = torch.from_numpy(S**2 / (spectrum**2).sum())
        writer.note(writer.put(layer, *arrays, record, {"kept": kept}))
    writer.finish()


def svd_basis(W: np.ndarray, method: dict, rank: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """U (d_out, r), S (r,), P (r, d_in), spectrum (k,) of W M for a random M of the metric."""
    d_in = W.shape[1]
    root: np.ndarray = np.eye(d_in)
    if method["metric"] == "full":
        X = rng.standard_normal((4 * d_in, d_in)) * rng.uniform(0.3, 3, d_in)
        root = np.linalg.cholesky(X.T @ X / len(X))
    elif method["metric"] == "diagonal":
        root = np.diag(rng.uniform(0.3, 3, d_in))
    U, S, Vt = np.linalg.svd(W @ root, full_matrices=False)
    P = Vt @ np.linalg.inv(root)
    if method["metric"] == "components":
        P = np.linalg.qr(rng.standard_normal((d_in, len(S))))[0].T
    chosen = np.arange(len(S))[:rank]
    if method["select"] == "activation":
        chosen = np.argsort(-S * rng.uniform(0.5, 2, len(S)))[:rank]
    return U[:, chosen], S[chosen], P[chosen], S


def write_moments(root, sites, dtype="float64"):
    """All moments of a store, as a calibration leaves them. sites: name -> SiteData."""
    shapes = {site: {name: tuple(one["shape"]) for name, one in data.members.items()} for site, data in sites.items()}
    begin_moments(root, shapes, {site: data.kind for site, data in sites.items()}, {})
    writer = MomentWriter(root, dtype)
    for site, data in sites.items():
        writer.note(writer.put(site, data))
    writer.flush()
    put_attributes(root, {**root.attrs, "moments": seal_sites(root)})


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
