"""A model as a folder that the transformers library loads: GPT-2, with its tokenizer and a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanostudy.atomic import whole_folder, write_atomically
from nanostudy.data.tokenizer import Tokenizer
from nanostudy.model.config import GPTConfig, count_parameters, parameter_table
from nanostudy.model.gpt import named_views
from nanostudy.settings import SamplingParams
from nanostudy.text import counted, plain, table
from nanostudy.training.tensors import write_safetensors
from nanostudy.training.weights import Weights
from nanostudy.version import VERSION

UNKNOWN = "[UNK]"  # not in the vocabulary, so that an unknown character is an error, as it is here
SPLITS = {"training": "train", "validation": "val"}
PRIVATE = ("corpus", "init_from")  # paths of this machine


def write_huggingface(weights: Weights, which: str, metadata: dict[str, Any], out: Path, overwrite: bool) -> None:
    """`metadata` is the run's run.json, empty for a weights file. Raises UsageError, NanostudyError."""
    files = {
        "config.json": _config(weights),
        "generation_config.json": _generation(weights),
        "tokenizer.json": _tokenizer(weights.tokenizer),
        "tokenizer_config.json": _tokenizer_config(weights),
    }
    with whole_folder(out, overwrite) as folder:
        for name, content in files.items():
            write_atomically(folder / name, json.dumps(content, indent=1) + "\n")
        write_atomically(folder / "README.md", model_card(weights, which, metadata, out.resolve().name))
        tensors = gpt2_tensors(weights.params, weights.config)
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})


# --- the model


def gpt2_tensors(params_1P: Tensor, shape: GPTConfig) -> dict[str, Tensor]:
    """Under GPT-2's names, which are nanoGPT's. GPT-2's linear layers have (in, out) matrices, and always biases."""
    views, tensors = named_views(params_1P, shape), {}
    for p in parameter_table(shape):
        tensor, linear = views[p.name][0].detach().cpu(), p.nanogpt_key.split(".")[-2].startswith("c_")
        tensors[p.nanogpt_key] = (tensor.T if linear and tensor.dim() == 2 else tensor).contiguous().clone()
        bias = p.nanogpt_key.removesuffix("weight") + "bias"
        if not shape.bias and (linear or p.fill):  # c_attn, c_proj, c_fc; and the LayerNorms, whose gains begin at 1
            tensors[bias] = torch.zeros(p.size[0])
    return tensors


def _config(w: Weights) -> dict[str, Any]:
    e, s = w.experiment, w.config
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": s.vocab_size,
        "n_positions": s.block_size,
        "n_embd": s.n_embd,
        "n_layer": s.n_layer,
        "n_head": s.n_head,
        "activation_function": "gelu",
        "layer_norm_epsilon": 1e-5,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), e.dropout),
        "tie_word_embeddings": s.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
        "torch_dtype": "float32",  # its name in older versions
    }


def _generation(w: Weights) -> dict[str, Any]:
    params = SamplingParams()
    top_k = min(params.top_k or w.config.vocab_size, w.config.vocab_size)
    return {"do_sample": True, "temperature": params.temperature, "top_k": top_k}


# --- the tokenizer


def _tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json of the tokenizers library: one word per character, or GPT-2's spelling of bytes without any merges."""
    model: dict[str, Any]
    if tokenizer.kind == "byte":
        byte_level = {"type": "ByteLevel", **dict.fromkeys(("add_prefix_space", "trim_offsets", "use_regex"), False)}
        pre_tokenizer, decoder = byte_level, byte_level
        unset = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
        vocab = {spelling: byte for byte, spelling in enumerate(_byte_spellings())}
        model = {"type": "BPE", **unset, "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": []}
    else:
        split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        pre_tokenizer, decoder = split, {"type": "Fuse"}
        vocab = {character: i for i, character in enumerate(tokenizer.characters)}
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": UNKNOWN}
    return {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "added_tokens": [],
        "pre_tokenizer": pre_tokenizer,
        "decoder": decoder,
        "model": model,
    }


def _byte_spellings() -> list[str]:
    """GPT-2's (Radford et al., 2019): printable Latin-1 characters stand for themselves, the rest for those from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _tokenizer_config(w: Weights) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": w.config.block_size,
        # without token_type_ids, which older versions send by default: GPT-2 would add the embedding of token 0 for them
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


# --- the card


def model_card(weights: Weights, which: str, metadata: dict[str, Any], name: str) -> str:
    """README.md: what the model is, how to use it, its text, its losses and its settings."""
    w, e, s = weights, weights.experiment, weights.config
    what = f"{counted(s.n_layer, 'layer')}, {counted(s.n_head, 'head')}, width {s.n_embd}, context {s.block_size}"
    unit = {"char": "character", "byte": "byte"}[w.tokenizer.kind]
    begun = "Trained from scratch" if e.init_from is None else "Trained, from another model's weights,"
    refused = "Characters that its text had not are refused. " if w.tokenizer.kind == "char" else ""
    settings = [(k, v) for k, v in e.as_dict().items() if v is not None and k not in PRIVATE]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- gpt2",
        "- nanostudy",
        "---",
        "",
        f"# {plain(metadata.get('name', e.name))}",
        "",
        f"A GPT of {count_parameters(s).total:,} parameters ({what}), one token per {unit}, {s.vocab_size} different. {begun} "
        f"with nanostudy {metadata.get('nanostudy', VERSION)}; these are its {which} weights, after "
        f"{counted(w.step, 'update')}.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
        f"model = AutoModelForCausalLM.from_pretrained({name!r})",
        f"prompt = tokenizer({w.tokenizer.opening!r}, return_tensors='pt')",
        f"print(tokenizer.decode(model.generate(**prompt, max_length={s.block_size})[0]))",
        "```",
        "",
        f"It reads {s.block_size} tokens at most, the prompt's and the new ones together. {refused}It knows no end of a text "
        "and no instructions; it writes on.",
        *(_data(metadata["corpus"]) if metadata else []),
        *_losses(metadata, s.block_size),
        *("", "## Settings", "", *table(("setting", "value"), settings)),
    ]
    return "\n".join(lines) + "\n"


def _data(corpus: dict[str, Any]) -> list[str]:
    rows = [("text", corpus["name"]), ("SHA-256", corpus["sha256"])]
    rows += [(f"{label} split", f"{corpus[split]['tokens']:,} tokens") for label, split in SPLITS.items()]
    return ["", "## Data", "", *table(("what", "value"), rows)]


def _losses(metadata: dict[str, Any], block_size: int) -> list[str]:
    evaluations = [(which, metadata.get(which) or {}) for which in ("final", "best")]
    rows = [
        (f"{which}, update {row['step']:,}", f"{row['train_loss']:.4f}", f"{row['val_loss']:.4f}")
        for which, row in evaluations
        if row.get("train_loss") is not None
    ]
    if not rows:
        return []
    meaning = (
        "Mean cross entropies in nats per token, without dropout: over the whole validation split in windows of "
        f"{block_size} tokens, and over at most as many of the training split."
    )
    return ["", "## Losses", "", *table(("evaluation", *SPLITS), rows), "", meaning]
