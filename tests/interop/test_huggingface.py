"""The folder for Hugging Face: loaded by transformers itself, it has our logits, our tokens and writes our text."""

import json
import re
from pathlib import Path

import pytest
import torch
from commands import call
from conftest import without_report, write_text
from hypothesis import given, settings
from hypothesis import strategies as st

import nanostudy
from nanostudy.data.tokenizer import Tokenizer
from nanostudy.interop import huggingface
from nanostudy.model.gpt import forward, named_views
from nanostudy.settings import Experiment, Resources
from nanostudy.training.tensors import load_tensors, save_tensors
from nanostudy.training.weights import load_weights

transformers = pytest.importorskip("transformers")
CPU = Resources(device="cpu", precision="fp32", threads=1)
VARIANTS = {
    "plain": {},
    "biases": {"bias": True},
    "a head of its own": {"tie_embeddings": False},
    "both, and bytes": {"bias": True, "tie_embeddings": False, "tokenizer": "byte"},
}
TEXT = "Ünd: the \n\n\tsea  is\u2028a song,\x00 and no 1 hears it \U0001f40b \u00a0 [UNK] <s> ' t\n"


def make(folder: Path, **of_experiment) -> Path:
    """A run whose weights are far from the first ones: no bias is zero, no gain is one."""
    text = folder / "text.txt"
    text.write_text(TEXT * 30, encoding="utf-8", newline="")
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "batch_size": 2, "max_iters": 1}
    e = Experiment(**{**shape, "corpus": str(text), "sample_tokens": 5, "eval_interval": 1, **of_experiment})
    with without_report():
        nanostudy.train(e, folder / "run", resources=CPU, listen=lambda event: None)
    for which in ("best", "last"):
        path = folder / "run" / f"{which}.safetensors"
        tensors, about = load_tensors(path)
        draw = torch.Generator().manual_seed(5)
        moved = {k: t + 0.3 * torch.randn(t.shape, generator=draw) for k, t in sorted(tensors.items())}
        save_tensors(path, moved, {k: v for k, v in about.items() if k != "format_version"})
    return folder / "run"


@pytest.fixture(scope="module", params=VARIANTS)
def run(request, tmp_path_factory) -> Path:
    """A run of each variant, with the folder for Hugging Face inside."""
    run = make(tmp_path_factory.mktemp("run"), **VARIANTS[request.param])
    assert nanostudy.convert(run, "huggingface").folder == run / "huggingface"
    return run


@pytest.fixture
def plain(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make(tmp_path)


def load(folder: Path):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def test_logits_tokens_and_text_are_ours(run):
    folder = run / "huggingface"
    model, tokenizer = load(folder)
    assert model.dtype == torch.float32
    weights = load_weights(run)
    # versions 4 and 5 differ in what they make of these where they are wrong
    assert model.config.tie_word_embeddings == weights.config.tie_embeddings
    drawing = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert "max_length" not in drawing  # beside it transformers warns at every max_new_tokens
    about = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert about["model_input_names"] == ["input_ids", "attention_mask"]
    views = named_views(weights.params, weights.config)

    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(weights.config.vocab_size, (3, 12), generator=draw)
    ours = forward(views, tokens[None], weights.config)[0]
    with torch.no_grad():
        theirs = model(tokens).logits
    assert ours.std() > 1, "logits so small that the tolerance says nothing"
    assert torch.allclose(ours, theirs, rtol=0, atol=3e-5)

    assert tokenizer(TEXT)["input_ids"] == weights.tokenizer.encode(TEXT).tolist()
    assert tokenizer.decode(weights.tokenizer.encode(TEXT).tolist()) == TEXT
    assert len(tokenizer) == weights.config.vocab_size

    prompt = tokenizer("the ", return_tensors="pt")
    assert set(prompt) == {"input_ids", "attention_mask"}, "GPT-2 would read token types as tokens"
    written = model.generate(**prompt, max_new_tokens=7, do_sample=False)
    expected = nanostudy.load(run, device="cpu").sample("the ", tokens=7, temperature=0.0)[0]
    assert tokenizer.decode(written[0]) == expected


def test_drawing_from_the_model_stays_within_its_context(run):
    """What the folder says of generating is enough: no option is needed, and no position is asked for that is not there."""
    model, tokenizer = load(run / "huggingface")
    torch.manual_seed(1)
    written = model.generate(**tokenizer("\n", return_tensors="pt"))
    assert written.shape == (1, 12)


def test_a_missing_bias_is_a_zero_bias(plain):
    folder = nanostudy.convert(plain, "huggingface").folder
    model, _ = load(folder)
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    assert len(biases) == 2 * 6 + 1
    assert not any(p.abs().sum() for p in biases.values())


# --- tokenizers, for any text


def tokenizer_of(kind: str, text: str, folder: Path):
    ours = Tokenizer.of(kind, text)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(huggingface._tokenizer(ours)), encoding="utf-8")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), clean_up_tokenization_spaces=False)
    return ours, theirs


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(codec="utf-8"), min_size=1), kind=st.sampled_from(["char", "byte"]))
def test_any_text_survives(tmp_path_factory, text, kind):
    ours, theirs = tokenizer_of(kind, text, tmp_path_factory.mktemp("tokenizer"))
    ids = ours.encode(text).tolist()
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text


def test_all_bytes_have_their_numbers(tmp_path):
    _, theirs = tokenizer_of("byte", "", tmp_path)
    assert len(theirs) == 256
    for character in map(chr, range(128)):
        assert theirs(character)["input_ids"] == [ord(character)]
    assert theirs("é")["input_ids"] == [0xC3, 0xA9]


def test_an_unknown_character_is_an_error_and_no_other_token(tmp_path):
    _, theirs = tokenizer_of("char", "abc", tmp_path)
    with pytest.raises(Exception, match="UNK"):
        theirs("abcd")


# --- the folder


def test_the_card_reports_data_settings_and_losses_and_its_code_runs(plain, monkeypatch, capsys):
    card = (nanostudy.convert(plain, "huggingface").folder / "README.md").read_text(encoding="utf-8")
    metadata = json.loads((plain / "run.json").read_text(encoding="utf-8"))
    for fact in (
        metadata["corpus"]["sha256"],
        f"{metadata['final']['val_loss']:.4f}",
        f"{metadata['best']['train_loss']:.4f}",
        f"{metadata['parameters']['total']:,} parameters",
        "| learning_rate | 0.001 |",
        "after 1 update.",
    ):
        assert fact in card, fact
    assert str(plain.parent) not in card, "paths of this machine are nobody's business"
    (code,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(plain)
    exec(code)
    assert len(capsys.readouterr().out) >= 12
    assert card.startswith("---\nlibrary_name: transformers\n")


@pytest.mark.usefixtures("plain")
def test_the_commands():
    told = call("convert", "run", "--to", "huggingface", "--out", "hf", "--which", "last")
    assert told.code == 0
    assert "last weights" in told.out
    load(Path("hf"))
    told = call("convert", "run", "--to", "huggingface", "--out", "hf")
    assert told.code == 2
    assert "--overwrite" in told.err
    assert call("convert", Path("run") / "best.safetensors", "--to", "huggingface", "--out", "two").code == 0
    load(Path("two"))


def test_a_small_text_of_the_usual_kind(tmp_path):
    """Letters and newlines only, as the tests of the rest have them."""
    ours, theirs = tokenizer_of("char", write_text(tmp_path / "a.txt").read_text(), tmp_path)
    text = "the sea is\na song  it\n\n"
    assert theirs(text)["input_ids"] == ours.encode(text).tolist()
    assert theirs.decode(theirs(text)["input_ids"]) == text
