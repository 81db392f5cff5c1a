"""A model as a folder that the transformers library loads: GPT-2, with its tokenizer and a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanostudy import version
from nanostudy.atomic import appearing, write_atomically
from nanostudy.data.corpus import Tokenizer
from nanostudy.interop.runs import Trained
from nanostudy.model.gpt import GPTConfig, count_parameters, named_views, parameter_table
from nanostudy.settings import SamplingParams
from nanostudy.text import counted, plain, table
from nanostudy.training.tensors import write_safetensors
from nanostudy.training.weights import Weights

BEYOND_CODE_POINTS = "[UNK]"  # of no vocabulary: an unknown character is an error, as it is here


def write_huggingface(trained: Trained, out: Path, overwrite: bool = False) -> None:
    """Raises UsageError, NanostudyError."""
    w = trained.weights
    files = {
        "config.json": _config(w),
        "generation_config.json": _generation(w),
        "tokenizer.json": _tokenizer(w.tokenizer),
        "tokenizer_config.json": _tokenizer_config(w),
    }
    with appearing(out, overwrite) as folder:
        for name, content in files.items():
            write_atomically(folder / name, json.dumps(content, indent=1) + "\n")
        write_atomically(folder / "README.md", model_card(trained, out.resolve().name))
        found = gpt2_tensors(w.params, w.shape)
        write_safetensors(folder / "model.safetensors", found, {"format": "pt"})


# --- the model


def gpt2_tensors(params_1P: Tensor, shape: GPTConfig) -> dict[str, Tensor]:
    """Under GPT-2's names, which are nanoGPT's. Its linear layers have (in, out) matrices, and always biases."""
    views, found = named_views(params_1P, shape), {}
    for p in parameter_table(shape):
        tensor, linear = views[p.name][0].detach().cpu(), p.nanogpt_key.split(".")[-2].startswith("c_")
        found[p.nanogpt_key] = (tensor.T if linear and tensor.dim() == 2 else tensor).contiguous().clone()
        bias = p.nanogpt_key.removesuffix("weight") + "bias"
        if not shape.bias and (linear or p.fill):  # c_attn, c_proj, c_fc; and the LayerNorms, whose gains begin at 1
            found[bias] = torch.zeros(p.size[0])
    return found


def _config(w: Weights) -> dict[str, Any]:
    e, s = w.experiment, w.shape
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
        "torch_dtype": "float32",  # what older versions call it
    }


def _generation(w: Weights) -> dict[str, Any]:
    picking = SamplingParams()
    top_k = min(picking.top_k or w.shape.vocab_size, w.shape.vocab_size)
    return {"do_sample": True, "temperature": picking.temperature, "top_k": top_k, "max_length": w.shape.block_size}


# --- the tokenizer


def _tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json of the tokenizers library: a word a character, or GPT-2's spelling of bytes without any merges."""
    parts: dict[str, Any]
    if tokenizer.kind == "byte":
        parts = {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": False,
                "use_regex": False,
            },
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": {spelling: byte for byte, spelling in enumerate(_byte_spellings())},
                "merges": [],
            },
        }
    else:
        parts = {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": r"[\s\S]"},
                "behavior": "Isolated",
                "invert": False,
            },
            "decoder": {"type": "Fuse"},
            "model": {
                "type": "WordLevel",
                "vocab": {character: i for i, character in enumerate(tokenizer.characters)},
                "unk_token": BEYOND_CODE_POINTS,
            },
        }
    rest: dict[str, Any] = {
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "post_processor": None,
    }
    return {"version": "1.0", **rest, **parts}


def _byte_spellings() -> list[str]:
    """GPT-2's (Radford et al., 2019): printable Latin-1 characters stand for themselves, the rest for those from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _tokenizer_config(w: Weights) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": w.shape.block_size,
        # not token_type_ids, which older versions send unasked: GPT-2 adds the embedding of token 0 for them
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


# --- the card


def model_card(trained: Trained, name: str) -> str:
    """README.md: what it is, how to use it, what it was trained on, with what settings, and its losses."""
    w, m = trained.weights, trained.metadata
    e, s, private = w.experiment, w.shape, ("corpus", "init_from")  # paths of this machine
    count = count_parameters(s)
    what = f"{counted(s.n_layer, 'layer')}, {counted(s.n_head, 'head')}, width {s.n_embd}, context {s.block_size}"
    unit = {"char": "character", "byte": "byte"}[w.tokenizer.kind]
    begun = "Trained from scratch" if e.init_from is None else "Trained, from another model's weights,"
    limits = [f"It reads {s.block_size} tokens at most, the prompt's and the new ones together."]
    if w.tokenizer.kind == "char":
        limits.append("Characters that its text had not are refused.")
    limits.append("It knows no end of a text and no instructions; it writes on.")
    lines = [
        *(
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags:",
            "- gpt2",
            "- nanostudy",
            "---",
            "",
        ),
        f"# {plain(m.get('name', e.name))}",
        "",
        f"A GPT of {count.total:,} parameters ({what}), one token a {unit}, {s.vocab_size} different. {begun} with nanostudy "
        f"{m.get('nanostudy', version.VERSION)}; these are its {trained.which} weights, after {counted(w.step, 'update')}.",
        "",
        *("```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""),
        f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
        f"model = AutoModelForCausalLM.from_pretrained({name!r})",
        f"prompt = tokenizer({w.tokenizer.opening!r}, return_tensors='pt')",
        "print(tokenizer.decode(model.generate(**prompt)[0]))",
        *("```", "", " ".join(limits)),
        *_data(m),
        *_losses(trained),
        *("", "## Settings", ""),
        *table(("setting", "value"), [(k, v) for k, v in e.as_dict().items() if v is not None and k not in private]),
    ]
    return "\n".join(lines) + "\n"


def _data(m: dict[str, Any]) -> list[str]:
    if not m:
        return []
    c = m["corpus"]
    rows = [("text", c["name"]), ("SHA-256", c["sha256"])]
    rows += [
        (f"{label} split", f"{c[k]['tokens']:,} tokens") for label, k in (("training", "train"), ("validation", "val"))
    ]
    return ["", "## Data", "", *table(("what", "value"), rows)]


def _losses(trained: Trained) -> list[str]:
    m = trained.metadata
    found = [(which, m[which]) for which in ("final", "best") if (m.get(which) or {}).get("train_loss") is not None]
    if not found:
        return []
    rows = [
        (f"{which}, update {row['step']:,}", f"{row['train_loss']:.4f}", f"{row['val_loss']:.4f}")
        for which, row in found
    ]
    told = (
        "Mean cross entropies in nats per token, without dropout: over the whole validation split in windows of "
        f"{trained.weights.shape.block_size} tokens, and over at most as many of the training split."
    )
    return ["", "## Losses", "", *table(("evaluation", "training", "validation"), rows), "", told]
