"""nanoGPT's checkpoints, both ways, against numbers that nanoGPT itself computed; and checkpoints that mean harm."""

import math
import os
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import call
from conftest import write_text

import nanostudy
from nanostudy.data.nanogpt_dataset import read_meta
from nanostudy.data.tokenizer import Tokenizer
from nanostudy.errors import Interrupted, NanostudyError, UsageError
from nanostudy.interop.nanogpt import read_checkpoint
from nanostudy.model.gpt import forward, named_views
from nanostudy.settings import Experiment, Resources
from nanostudy.settings_files import experiment_and_resources, read_settings
from nanostudy.training.run_folder import read_metadata, read_rows
from nanostudy.training.weights import load_weights

CPU = Resources(device="cpu", precision="fp32", threads=1)
ON_CPU = {"device": "cpu", "precision": "fp32", "threads": 1}

# --- a checkpoint in nanoGPT's layout, written down by hand: nothing here asks nanostudy what nanoGPT does

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 6, "vocab_size": 5}
TRAIN, VAL = [3, 1, 4, 1, 0, 2, 4], [2, 0, 4, 3, 1, 1, 0]  # one window each: all batches of nanoGPT's are this one
SETTINGS = {
    **{
        "dataset": "tiny",
        "max_iters": 8,
        "learning_rate": 1e-2,
        "min_lr": 1e-3,
        "warmup_iters": 5,
        "lr_decay_iters": 20,
    },
    **{"batch_size": 2, "gradient_accumulation_steps": 2, "block_size": 6, "eval_interval": 1, "log_interval": 1},
    **{"dropout": 0.0, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 0.5, "decay_lr": True},
    **{"n_layer": 2, "n_head": 2, "n_embd": 8},
}


def keys(bias: bool) -> dict[str, tuple[int, ...]]:
    """Of nanoGPT's model.named_parameters(), in its order, with their shapes."""
    E, V, T = SIZES["n_embd"], SIZES["vocab_size"], SIZES["block_size"]
    layer = {
        **{"ln_1": (E,), "attn.c_attn": (3 * E, E), "attn.c_proj": (E, E)},
        **{"ln_2": (E,), "mlp.c_fc": (4 * E, E), "mlp.c_proj": (E, 4 * E)},
    }
    modules = {f"transformer.h.{i}.{name}": size for i in range(SIZES["n_layer"]) for name, size in layer.items()}
    loaded = {"transformer.wte.weight": (V, E), "transformer.wpe.weight": (T, E)}
    for name, size in {**modules, "transformer.ln_f": (E,)}.items():
        loaded[f"{name}.weight"] = size
        if bias:
            loaded[f"{name}.bias"] = size[:1]
    return loaded


def seeded(seed: int, size: tuple[int, ...]) -> torch.Tensor:
    """Numbers in [-0.5, 0.5) that a seed makes on every machine: a counter, mixed in whole numbers."""
    x = np.arange(math.prod(size), dtype=np.uint64) + np.uint64(seed * 1009 + 17)
    for factor, shift in ((2654435761, 15), (2246822519, 13)):
        x = x * np.uint64(factor) % np.uint64(2**32)
        x ^= x >> np.uint64(shift)
    return torch.from_numpy((x / 2**32 - 0.5).reshape(size))


def nanogpt_checkpoint(bias: bool, prefix: str = "") -> dict:
    """What nanoGPT's train.py saves at iteration 7."""
    sizes = keys(bias)
    model, first, second = OrderedDict(), [], []
    for i, (key, size) in enumerate(sizes.items()):
        gain = 1 if "ln_" in key and key.endswith("weight") else 0
        model[key] = (gain + 0.6 * seeded(i, size)).float()
        first.append((0.02 * seeded(i + 100, size)).float())
        second.append((0.02 * seeded(i + 200, size) ** 2 + 1e-6).float())
    order = sorted(range(len(sizes)), key=lambda i: len(list(sizes.values())[i]) < 2)
    decayed = sum(len(size) > 1 for size in sizes.values())
    state = {
        place: {"step": torch.tensor(7.0), "exp_avg": first[i], "exp_avg_sq": second[i]}
        for place, i in enumerate(order)
    }
    unset = dict.fromkeys(("foreach", "fused"))
    group = {**{"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}, **unset}
    group |= dict.fromkeys(("amsgrad", "maximize", "capturable", "differentiable"), False)
    groups = [
        {**group, "weight_decay": 0.1, "params": list(range(decayed))},
        {**group, "weight_decay": 0.0, "params": list(range(decayed, len(order)))},
    ]
    model["lm_head.weight"] = model["transformer.wte.weight"]
    return {
        "model": OrderedDict((prefix + key, tensor) for key, tensor in model.items()),
        "optimizer": {"state": state, "param_groups": groups},
        "model_args": {**SIZES, "bias": bias, "dropout": 0.0},
        "iter_num": 7,
        "best_val_loss": torch.tensor(2.5),
        "config": {**SETTINGS, "bias": bias},
    }


# Made once by nanoGPT (3adf61e, PyTorch 2.13, CPU, fp32) from these weights: the logits after both windows; and, after its
# unmodified train.py had resumed from this checkpoint and saved at iteration 8 (--init_from=resume --device=cpu
# --compile=False --dtype=float32 --eval_iters=1, the settings above as its configuration), the losses that it printed there,
# and of each tensor, in the order of the keys, `ramp`; the last row times 1,000.
# fmt: off
GOLDEN = {
    False: {
        "logits": [
            [-0.6276895, -0.3765356, 0.4712749, -0.7373313, -0.0933183],
            [0.3594384, 0.4551882, -0.3933483, 0.391789, -0.0829437],
        ],
        "losses": [(1.5476, 1.6081), (1.5006, 1.6490)],
        "params": [
            0.94757387, -0.94266442, 5.162909, 0.47114291, -0.092845845, 5.1129079, -1.7318459, -1.6668088, 4.3827856,
            -0.62945008, -0.15025156, 4.0662581, -0.44434329, -0.91110394, 4.6488667,
        ],
        "exp_avg": [
            -0.02614639, 0.010359253, 0.0034575553, -0.075530698, 0.027582719, 0.016783442, 0.0041650441,
            -0.049109467, -7.3705247e-05, -0.030681907, -0.081656321, -0.024431404, -0.021073032, 0.12885615,
            -0.0034631483,
        ],
        "exp_avg_sq": [
            25.744378, 45.512317, 7.5747868, 154.06981, 56.453869, 6.9511276, 182.50812, 189.0479, 7.9795705,
            147.68616, 49.144468, 11.657205, 206.90983, 212.18779, 8.6675654,
        ],
    },
    True: {
        "logits": [
            [-0.1134933, -0.0520523, 0.5313758, 0.2743741, -0.0603734],
            [0.2413812, 0.3335027, 0.2003836, 0.6156151, 0.0326411],
        ],
        "losses": [(1.8784, 1.7809), (1.8468, 1.7801)],
        "params": [
            0.94068042, -0.9447647, 5.1630224, -0.65178615, -0.96831294, 0.15476402, -1.6802195, 0.39320921,
            4.3862283, 0.39125448, -0.73086921, -0.11106934, -0.46022378, -0.0010884777, 4.649228, 0.18190827,
            -0.47463935, 1.1759457, 0.26195526, -0.16743105, 3.8925913, 0.40969478, -1.6423513, -0.14278941,
            -0.91586739, -0.41870915, 5.1479248, 0.071753815,
        ],
        "exp_avg": [
            -0.025050614, 0.010104227, 0.0027606843, 0.0075221204, 0.012490712, -0.019576665, -0.035994606,
            0.0040572371, -0.00028404151, -0.0073098237, -0.043883016, -0.0053832815, -0.018946055, 0.012637855,
            -0.0022057163, 0.00022882034, -0.0043108998, -0.0023498127, -0.0015336655, 0.014405774, 0.017483092,
            -0.0011703944, 0.0012697237, -0.011685971, 0.0047014035, -0.0021405713, 0.005820061, -0.011403955,
        ],
        "exp_avg_sq": [
            27.850416, 45.456063, 7.5737111, 8.2992546, 143.14838, 20.086488, 49.359265, 10.453391, 7.9863655,
            5.5610003, 209.99081, 21.655673, 206.71679, 7.0299262, 8.6601988, 5.8744049, 153.11362, 17.383283,
            62.805812, 11.381006, 7.9117559, 6.5104955, 219.17151, 33.544622, 224.50025, 11.188909, 5.9482358,
            4.7877634,
        ],
    },
}
# fmt: on


def ramp(tensor: torch.Tensor) -> float:
    """A sum in which every place has a weight of its own, from 1/n up to 1: moved numbers show."""
    n = tensor.numel()
    return float((tensor.double().flatten() * torch.arange(1, n + 1)).sum() / n)


@pytest.fixture
def here(tmp_path, monkeypatch, no_report) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(folder: Path, content: dict, meta: bool = True) -> Path:
    """A checkout's out/ckpt.pt and data/tiny."""
    data = folder / "data" / "tiny"
    data.mkdir(parents=True, exist_ok=True)
    for name, ids in (("train", TRAIN), ("val", VAL)):
        np.array(ids, dtype=np.uint16).tofile(data / f"{name}.bin")
    if meta:
        letters = dict(enumerate("abcde"))
        known = {"vocab_size": 5, "itos": letters, "stoi": {c: i for i, c in letters.items()}}
        (data / "meta.pkl").write_bytes(pickle.dumps(known))
    (folder / "out").mkdir(exist_ok=True)
    torch.save(content, folder / "out" / "ckpt.pt")
    return folder / "out" / "ckpt.pt"


def refusal(action, *words: str) -> str:
    with pytest.raises(NanostudyError) as problem:
        action()
    message = str(problem.value)
    assert all(word in message for word in words), message
    return message


# --- in


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_logits_are_those_of_nanogpt(here, bias, prefix):
    run = nanostudy.load(nanostudy.convert(put(here, nanogpt_checkpoint(bias, prefix)), here / "run", **ON_CPU).folder)
    weights = run.weights
    assert weights.tokenizer.characters == "abcde"
    tokens = torch.tensor([TRAIN[:-1], VAL[:-1]])
    logits = forward(named_views(weights.params, weights.config), tokens[None], weights.config)[0, :, -1]
    assert torch.allclose(logits, torch.tensor(GOLDEN[bias]["logits"]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_a_resumed_step_is_that_of_nanogpt(here, bias):
    """nanoGPT's checkpoint of iteration 7, one update here, and what nanoGPT has at iteration 8."""
    nanostudy.convert(put(here, nanogpt_checkpoint(bias)), here / "run", **ON_CPU)
    assert read_metadata(here / "run")["status"] == "unfinished"
    run = resume(here / "run")
    assert run.metadata["status"] == "finished"
    rows = read_rows(here / "run" / "evaluations.csv")
    losses = [(row["train_loss"], row["val_loss"]) for row in rows]
    assert [row["step"] for row in rows] == [7, 8]
    assert np.allclose(losses, GOLDEN[bias]["losses"], rtol=0, atol=6e-5)  # printed with four digits

    nanostudy.convert(here / "run", "nanogpt")
    loaded = torch.load(here / "run" / "nanogpt" / "ckpt.pt", weights_only=True)
    before = nanogpt_checkpoint(bias)
    names = list(keys(bias))
    assert loaded["iter_num"] == 8
    assert_close([ramp(loaded["model"][name]) for name in names], GOLDEN[bias]["params"], 1e-5)
    places = sorted(range(len(names)), key=lambda i: before["model"][names[i]].dim() < 2)
    state = {names[i]: loaded["optimizer"]["state"][place] for place, i in enumerate(places)}
    assert {float(entry["step"]) for entry in state.values()} == {8.0}
    assert_close([ramp(state[name]["exp_avg"]) for name in names], GOLDEN[bias]["exp_avg"], 1e-7)
    assert_close([1000 * ramp(state[name]["exp_avg_sq"]) for name in names], GOLDEN[bias]["exp_avg_sq"], 1e-4)


def assert_close(loaded, golden, atol):
    assert np.allclose(loaded, golden, rtol=2e-6, atol=atol), np.abs(np.array(loaded) - golden).max()


def settings_of(folder: Path | str) -> Experiment:
    """What `nanostudy train FOLDER` trains."""
    experiment, resources = experiment_and_resources(read_settings(str(folder)))
    assert resources == CPU
    return experiment


def resume(folder: Path | str) -> nanostudy.Run:
    return nanostudy.train(settings_of(folder), folder, resources=CPU, listen=lambda event: None)


def test_a_converted_run_goes_on_wherever_its_folder_is_moved(here):
    nanostudy.convert(put(here, nanogpt_checkpoint(False)), here / "run", **ON_CPU)
    (here / "elsewhere").mkdir()
    (here / "run").rename(here / "elsewhere" / "mine")
    run = resume(here / "elsewhere" / "mine")
    assert run.metadata["updates"] == 8


def test_settings_of_the_checkpoint_and_of_the_command(here):
    put(here, nanogpt_checkpoint(True))
    nanostudy.convert("out/ckpt.pt", "run", max_iters="12", learning_rate="0.5", **ON_CPU)
    experiment = settings_of("run")
    assert (experiment.max_iters, experiment.learning_rate, experiment.beta2) == (12, 0.5, 0.95)
    assert (experiment.bias, experiment.n_embd, experiment.grad_clip, experiment.seed) == (True, 8, 0.5, 1337)
    assert call("convert", "out/ckpt.pt", "--to", "other", "max_iters=3").code == 2
    assert call("convert", "out/ckpt.pt", "--to", "other", "n_embd=16").code == 2
    assert call("convert", "out/ckpt.pt", "--to", "other", "n_emdb=16").code == 2
    assert not Path("other").exists()


def test_a_converted_checkpoint_is_evaluated_at_any_update(here):
    done = nanostudy.convert(put(here, nanogpt_checkpoint(False)), "run", eval_interval=5, max_iters=11, **ON_CPU)
    assert any("update 7: train 1.5476, val 1.6081" in note for note in done.notes)
    assert "7 of 11 updates" in done.notes[-1]
    resume("run")
    assert [row["step"] for row in read_rows(Path("run/evaluations.csv"))] == [7, 10, 11]


def test_a_finished_checkpoint_becomes_a_finished_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # this one writes its report
    content = nanogpt_checkpoint(False)
    content["config"]["max_iters"] = 7
    put(tmp_path, content)
    told = call("convert", "out/ckpt.pt", "--to", "run", "device=cpu", "precision=fp32", "threads=1")
    assert told.code == 0
    assert "update 7: train 1.5476, val 1.6081" in told.out
    metadata = read_metadata(Path("run"))
    assert (metadata["status"], metadata["updates"]) == ("finished", 7)
    assert "nanoGPT" in Path("run/report.md").read_text(encoding="utf-8")
    assert len(nanostudy.load("run").sample(tokens=20)) == 1
    assert not Path("run/checkpoint.safetensors").exists()
    assert call("train", "run").code == 0  # a result is only loaded


def test_a_converted_run_is_another_experiment_than_one_trained_here(here):
    """Whoever trains with the same settings, or starts afresh from the same weights, makes another experiment."""
    put(here, nanogpt_checkpoint(False))
    nanostudy.convert("out/ckpt.pt", "run", **ON_CPU)
    came = settings_of("run")
    identity = read_metadata(Path("run"))["identity"]
    native = nanostudy.train(Experiment(**{**came.as_dict(), "init_from": None}), "native", resources=CPU, listen=print)
    warm = nanostudy.train(Experiment(**{**came.as_dict(), "init_from": "run"}), "warm", resources=CPU, listen=print)
    assert len({identity, native.metadata["identity"], warm.metadata["identity"]}) == 3
    message = refusal(lambda: nanostudy.train(came, "third", resources=CPU), "their own folder")
    assert "imported.safetensors" in message


def test_without_the_text_there_is_a_model_to_sample_from(here):
    content = nanogpt_checkpoint(False)
    content["config"] = {}
    path = put(here, content)
    letters = here / "letters.txt"
    letters.write_text("edcba" * 9, encoding="utf-8")
    done = nanostudy.convert(path, "run", characters=str(letters))
    assert any("text is not at hand" in note for note in done.notes)
    assert set(nanostudy.load("run").sample(tokens=30)[0]) <= set("abcde")
    assert nanostudy.convert("run", "nanogpt", out="again").folder == Path("again")
    loaded = torch.load("again/ckpt.pt", weights_only=True)["model"]
    assert_same(loaded, {key: content["model"][key] for key in loaded})


def test_tokens_that_nobody_can_read(here):
    content = nanogpt_checkpoint(False)
    path = put(here, content, meta=False)
    (here / "data" / "tiny" / "train.bin").unlink()
    refusal(lambda: nanostudy.convert(path, "run"), "--meta", "--characters", "meta.pkl")
    (here / "four.txt").write_text("abcd" * 9)
    refusal(lambda: nanostudy.convert(path, "run", characters=str(here / "four.txt")), "5 tokens", "has 4")
    assert not Path("run").exists()


def test_a_head_of_its_own_comes_in_and_does_not_leave_for_nanogpt(here):
    content = nanogpt_checkpoint(False)
    content["model"]["lm_head.weight"] = content["model"]["lm_head.weight"] + 1
    nanostudy.convert(put(here, content), "run", **ON_CPU)
    weights = load_weights(Path("run"))
    assert not weights.config.tie_embeddings
    head = named_views(weights.params, weights.config)["head"][0]
    assert torch.equal(head, content["model"]["lm_head.weight"])
    message = refusal(lambda: nanostudy.convert("run", "nanogpt"), "tie_embeddings", "without a word")
    assert "huggingface" in message
    assert not Path("run/nanogpt").exists()


def test_an_optimizer_in_another_layout_is_left_out_and_reported(here):
    content = nanogpt_checkpoint(False)
    content["optimizer"]["param_groups"][0]["params"].pop()
    put(here, content)
    done = nanostudy.convert("out/ckpt.pt", "run", **ON_CPU)
    assert any("optimizer" in note for note in done.notes)
    assert nanostudy.load("run").metadata["status"] == "finished"
    assert nanostudy.load("run").metadata["updates"] == 7
    refusal(lambda: nanostudy.convert("out/ckpt.pt", "other", max_iters=9), "max_iters", "optimizer", "init_from")


def test_a_converted_run_without_its_checkpoint_does_not_begin_again(here):
    put(here, nanogpt_checkpoint(False))
    nanostudy.convert("out/ckpt.pt", "run", **ON_CPU)
    for path in Path("run").glob("checkpoint*"):
        path.unlink()
    refusal(lambda: resume("run"), "imported.safetensors")


TIED = ("transformer.wte.weight", "lm_head.weight")
BROKEN = {
    "no model": (lambda c: c.pop("model"), "no 'model'"),
    "no sizes": (lambda c: c.pop("model_args"), "no 'model_args'"),
    "no iteration": (lambda c: c.pop("iter_num"), "no 'iter_num'"),
    "a missing weight": (lambda c: c["model"].pop("transformer.h.1.mlp.c_fc.weight"), "no transformer.h.1.mlp.c_fc.weight"),
    "an odd weight": (lambda c: c["model"].update(extra=torch.zeros(3)), "extra is no weight"),
    "a wrong shape": (
        lambda c: c["model"].update({"transformer.wpe.weight": torch.zeros(7, 8)}),
        "transformer.wpe.weight has the shape (7, 8)",
    ),
    "a missing layer": (lambda c: c["model_args"].update(n_layer=3), "weights are those of 2 layers"),
    "a million layers": (lambda c: c["model_args"].update(n_layer=10**6), "weights are those of 2 layers"),
    "a size that is none": (lambda c: c["model_args"].update(n_embd="8"), "n_embd is '8'"),
    "heads that do not divide": (lambda c: c["model_args"].update(n_head=3), "no model has the sizes"),
    "no heads": (lambda c: c["model_args"].update(n_head=0), "no model has the sizes"),
    "text for a weight": (lambda c: c["model"].update({"transformer.ln_f.weight": "ones"}), "is no plain tensor"),
    "a sparse weight": (lambda c: c["model"].update({"transformer.ln_f.weight": torch.ones(8).to_sparse()}), "is no plain"),
    "tensors larger than the file": (
        lambda c: (
            c["model_args"].update(vocab_size=10**9),
            c["model"].update(dict.fromkeys(TIED, torch.zeros(1).expand(10**9, 8))),
        ),
        "is larger than the file",
    ),
    "a bias where none is": (
        lambda c: c["model"].update({"transformer.ln_f.bias": torch.zeros(8)}),
        "transformer.ln_f.bias is no weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_wrong_with_a_checkpoint_is_named(here, what):
    content = nanogpt_checkpoint(False)
    change, message = BROKEN[what]
    change(content)
    path = put(here, content)
    refusal(lambda: nanostudy.convert(path, "run"), "ckpt.pt", message)
    assert not Path("run").exists()


def test_masks_of_older_versions_and_half_precision(here):
    content = nanogpt_checkpoint(True)
    for layer in range(2):
        content["model"][f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 6, 6).tril()
    content["model"] = OrderedDict((key, tensor.bfloat16()) for key, tensor in content["model"].items())
    content["model_args"].pop("bias")  # older versions knew only biases
    loaded = read_checkpoint(put(here, content))
    assert loaded.shape.bias
    assert loaded.params_1P.dtype == torch.float32
    assert any("fp32" in note for note in loaded.notes)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(best_val_loss=torch.ones(3)),
        lambda c: c.update(best_val_loss="low"),
        lambda c: c["config"].update(max_iters="many", learning_rate=None, dataset=["tiny"], grad_clip=torch.ones(2)),
        lambda c: c["config"].update(max_iters=math.nan),
        lambda c: c.update(config="none"),
        lambda c: c["optimizer"]["state"][0].update(step=torch.tensor(math.inf)),
        lambda c: c["optimizer"]["state"][3].update(step=torch.tensor(3.0)),
        lambda c: [entry.update(step=1e300) for entry in c["optimizer"]["state"].values()],
        lambda c: c["optimizer"]["state"][2].update(exp_avg=torch.zeros(2)),
        lambda c: c["optimizer"]["state"].pop(4),
        lambda c: c.update(optimizer=None),
        lambda c: c.update(optimizer={"state": {}, "param_groups": []}),
        lambda c: c["optimizer"].update(state={}),
    ],
)
def test_what_is_odd_beside_the_weights_does_not_keep_them_out(here, change):
    content = nanogpt_checkpoint(False)
    change(content)
    path = put(here, content)
    nanostudy.convert(path, "run", characters="data/tiny", corpus="data/tiny", **ON_CPU)
    assert torch.equal(load_weights(Path("run")).params, read_checkpoint(path).params_1P)
    assert len(nanostudy.load("run").sample(tokens=3)[0]) == 3


def test_what_a_user_of_nanogpt_tries_first(here):
    put(here, nanogpt_checkpoint(False))
    for words in (("sample", "out/ckpt.pt"), ("train", "out")):
        told = call(*words)
        assert told.code == 2
        assert "nanostudy convert out/ckpt.pt" in told.err


# --- hostile files


class Trap:
    """Unpickled by Python, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"echo harm > {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_that_carries_code_is_refused_and_named(here, legacy):
    sprung = here / "sprung"
    path = here / "ckpt.pt"
    torch.save({**nanogpt_checkpoint(False), "config": Trap(sprung)}, path, _use_new_zipfile_serialization=not legacy)
    told = call("convert", path, "--to", "run")
    assert told.code == 1
    assert "ckpt.pt carries code" in told.err
    assert f"{os.system.__module__}.system" in told.err
    assert not sprung.exists()
    assert not Path("run").exists()
    torch.load(path, weights_only=False)
    assert sprung.exists(), "the trap is none"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x80\x04K\x01.", os.urandom(2000), b"text\n"])
def test_files_that_are_no_checkpoints(here, content):
    (here / "ckpt.pt").write_bytes(content)
    refusal(lambda: nanostudy.convert(here / "ckpt.pt", "run"), "ckpt.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_numbers_of_numpy_are_numbers(here, legacy):
    """As forks save them that compute their losses in NumPy."""
    content = nanogpt_checkpoint(False)
    sizes = {name: np.int32(content["model_args"][name]) for name in ("n_layer", "vocab_size")}
    odd = {"best_val_loss": np.float64(2.5), "iter_num": np.int64(content["iter_num"])}
    odd["model_args"] = {**content["model_args"], **sizes, "bias": np.bool_(False)}
    odd["config"] = {**content["config"], "learning_rate": np.float32(0.5), "max_iters": np.uint16(9)}
    torch.save({**content, **odd}, here / "ckpt.pt", _use_new_zipfile_serialization=not legacy)
    read = read_checkpoint(here / "ckpt.pt")
    assert (read.best_val_loss, read.iter_num, read.config["learning_rate"], read.config["max_iters"]) == (
        2.5,
        7,
        0.5,
        9,
    )
    for value in (np.zeros(3), np.str_("text"), np.datetime64("2020-01-01"), np.complex64(1), np.void(b"abc")):
        torch.save({**content, "best_val_loss": value}, here / "ckpt.pt")
        refusal(lambda: read_checkpoint(here / "ckpt.pt"), "ckpt.pt")


def test_a_checkpoint_that_grows_when_it_is_read_is_refused(here):
    large = here / "large.pt"
    torch.save({**nanogpt_checkpoint(False), "rest": torch.zeros(10**7)}, large)
    path = here / "ckpt.pt"
    with zipfile.ZipFile(large) as parts, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for part in parts.infolist():
            packed.writestr(part.filename, parts.read(part))
    assert path.stat().st_size < 10**6
    tracemalloc.start()
    refusal(lambda: read_checkpoint(path), "ckpt.pt has", "takes 40,0", "compressed")
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()
    refusal(lambda: read_checkpoint(Path("/dev/zero")), "no regular file")


@pytest.mark.parametrize(
    "args",
    [
        {"activation": "relu"},
        {"rope": True},
        {"norm_placement": "post"},
        {"n_kv_head": 1},
        {"flash": 1.0},
        {"extra": [[]]},
        {7: 1},
    ],
)
def test_a_fork_whose_model_computes_something_else_is_refused(here, args):
    content = nanogpt_checkpoint(False)
    content["model_args"].update(args)
    name, value = next(iter(args.items()))
    message = refusal(lambda: nanostudy.convert(put(here, content), "run"), "its model_args have", f"{name}={value!r}")
    assert "save the checkpoint again" in message
    assert not Path("run").exists()


def test_a_fork_that_computes_the_same_is_told(here):
    content = nanogpt_checkpoint(False)
    content["model_args"].update(activation="gelu", rope=False, norm_placement="pre", window=None)
    done = nanostudy.convert(put(here, content), "run", **ON_CPU)
    note = "model_args has activation='gelu', rope=False, norm_placement='pre' and window=None"
    assert any(note in line for line in done.notes)


def test_a_checkpoint_that_was_cut_short(here):
    path = put(here, nanogpt_checkpoint(False))
    path.write_bytes(path.read_bytes()[:5000])
    refusal(lambda: nanostudy.convert(path, "run"), "damaged")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_that_diverged_is_refused(here, value):
    content = nanogpt_checkpoint(False)
    content["model"]["transformer.ln_f.weight"][0] = value
    path = put(here, content)
    refusal(
        lambda: nanostudy.convert(path, "run"), "ckpt.pt has weights that are not finite", "Take an earlier checkpoint"
    )
    assert not (here / "run").exists()


def test_a_meta_pkl_that_carries_code_is_refused_and_named(here):
    path, sprung = put(here, nanogpt_checkpoint(False)), here / "sprung"
    meta = here / "data" / "tiny" / "meta.pkl"
    for trap in (Trap(sprung), {"itos": {0: "a"}, "stoi": {"a": 0}, "vocab_size": Trap(sprung)}):
        meta.write_bytes(pickle.dumps(trap))
        refusal(lambda: read_meta(meta), "meta.pkl", f"{os.system.__module__}.system")
        refusal(lambda: nanostudy.convert(path, "run"), "meta.pkl", f"{os.system.__module__}.system")
    assert not sprung.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x04r\xff\xff\xff\xff.",
        pickle.dumps([1, 2]),
        pickle.dumps({"itos": {0: "a", 2: "b"}}),
        pickle.dumps({"itos": {0: "a", 1: "the"}}),
        pickle.dumps({"itos": {0: "a", 1: "a"}}),
        pickle.dumps({"itos": {0: "a", 1: 7}}),
        pickle.dumps({"itos": {0: "a", 1: "\ud800"}}),
        pickle.dumps({"itos": {0: "a", 1: "b"}, "stoi": {"a": 1, "b": 0}}),
        pickle.dumps({"itos": {0: "a", 1: "b"}, "vocab_size": 3}),
        pickle.dumps({"stoi": {"a": 0, "b": [1]}}),
        pickle.dumps(np.float64(3)),
    ],
)
def test_metas_that_are_none(here, content):
    (here / "meta.pkl").write_bytes(content)
    refusal(lambda: read_meta(here / "meta.pkl"), "meta.pkl")


def test_a_meta_of_any_order_and_either_direction(here):
    path = here / "meta.pkl"
    for meta in ({"itos": {0: "b", 1: "\n", 2: "a"}}, {"itos": ["b", "\n", "a"]}, {"stoi": {"a": 2, "b": 0, "\n": 1}}):
        path.write_bytes(pickle.dumps(meta, protocol=2))
        assert read_meta(path) == Tokenizer("char", "b\na")


# --- out


def assert_same(loaded: dict, expected: dict) -> None:
    assert list(loaded) == list(expected)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert loaded[name].dtype == value.dtype
            assert torch.equal(loaded[name], value), name
        elif isinstance(value, dict):
            assert_same(loaded[name], value)
        else:
            assert loaded[name] == value, name


@pytest.mark.parametrize("bias", [False, True])
def test_a_converted_checkpoint_converts_back_unchanged(here, bias):
    """Weights, AdamW's state and its groups, in nanoGPT's order: nanoGPT resumes as if nothing had happened."""
    content = nanogpt_checkpoint(bias)
    nanostudy.convert(put(here, content), "run", **ON_CPU)
    done = nanostudy.convert("run", "nanogpt", out="back")
    loaded = torch.load("back/ckpt.pt", weights_only=True)
    assert set(loaded) == set(content)
    assert not any("NOTE" in note for note in done.notes)
    assert_same(loaded["model"], {key: content["model"][key] for key in loaded["model"]})
    assert set(loaded["model"]) == set(content["model"])
    assert loaded["model"]["lm_head.weight"].data_ptr() == loaded["model"]["transformer.wte.weight"].data_ptr()
    assert_same(loaded["optimizer"]["state"], content["optimizer"]["state"])
    for group, expected in zip(loaded["optimizer"]["param_groups"], content["optimizer"]["param_groups"], strict=True):
        for name in ("params", "weight_decay", "betas", "eps", "amsgrad"):
            assert group[name] == expected[name], name
    assert loaded["model_args"] == content["model_args"]
    assert loaded["iter_num"] == 7
    kept = {name: value for name, value in content["config"].items() if name != "dataset"}
    assert {name: loaded["config"][name] for name in kept} == kept
    assert pickle.loads(Path("back/meta.pkl").read_bytes())["itos"] == dict(enumerate("abcde"))


def test_torch_takes_the_optimizer_as_its_own(here):
    nanostudy.convert(put(here, nanogpt_checkpoint(True)), "run", **ON_CPU)
    nanostudy.convert("run", "nanogpt")
    loaded = torch.load("run/nanogpt/ckpt.pt", weights_only=True)
    named = {key: torch.nn.Parameter(loaded["model"][key].clone()) for key in keys(True)}
    groups = [[p for p in named.values() if p.dim() >= 2], [p for p in named.values() if p.dim() < 2]]
    optimizer = torch.optim.AdamW([{"params": group, "weight_decay": 1.0} for group in groups], lr=1.0)
    optimizer.load_state_dict(loaded["optimizer"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for parameter in named.values():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def trained(folder: Path, **settings) -> Path:
    text = write_text(folder / "small.txt")
    shape = {
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 8,
        "block_size": 8,
        "batch_size": 2,
        "warmup_iters": 2,
        "sample_tokens": 5,
    }
    e = Experiment(**{**shape, "corpus": str(text), "max_iters": 6, "eval_interval": 2, **settings})
    return nanostudy.train(e, folder / "mine", resources=CPU, listen=lambda event: None).folder


def test_a_run_keeps_what_going_on_needs(here):
    """The last weights leave with AdamW's state; the best, where they are others, without, and that is said."""
    run = trained(here, learning_rate=0.3, decay_lr=False, max_iters=40, eval_interval=1, seed=3)
    metadata = read_metadata(run)
    assert metadata["best"]["step"] < 40, "make it overfit or diverge a little: the best is to be another than the last"
    done = nanostudy.convert(run, "nanogpt", out="last")
    loaded = torch.load("last/ckpt.pt", weights_only=True)
    assert (loaded["iter_num"], loaded["best_val_loss"]) == (40, metadata["best"]["val_loss"])
    assert {float(entry["step"]) for entry in loaded["optimizer"]["state"].values()} == {40.0}
    assert not any("NOTE" in note for note in done.notes)
    assert any("--which best" in note for note in done.notes)
    done = nanostudy.convert(run, "nanogpt", out="best", which="best")
    loaded = torch.load("best/ckpt.pt", weights_only=True)
    assert loaded["iter_num"] == metadata["best"]["step"]
    assert loaded["optimizer"]["state"] == {}
    assert any("AdamW starts afresh" in note for note in done.notes)
    (run / "optimizer.safetensors").unlink()
    assert any("AdamW starts afresh" in note for note in nanostudy.convert(run, "nanogpt", out="without").notes)


def test_a_run_that_was_interrupted_leaves_from_where_it_stands(here):
    def stop(event):
        if getattr(event, "step", 0) == 4:
            raise Interrupted("stopped")

    text = write_text(here / "small.txt")
    e = Experiment(n_layer=1, n_head=2, n_embd=8, block_size=8, max_iters=6, eval_interval=2, corpus=str(text))
    with pytest.raises(Interrupted):
        nanostudy.train(e, "run", resources=CPU, save_every=0, listen=stop)
    nanostudy.convert("run", "nanogpt")
    loaded = torch.load("run/nanogpt/ckpt.pt", weights_only=True)
    assert loaded["iter_num"] == 3  # the last that was saved
    assert {float(entry["step"]) for entry in loaded["optimizer"]["state"].values()} == {3.0}
    assert "init_from = 'resume'" in Path("run/nanogpt/resume.py").read_text()
    nanostudy.train(e, "run", resources=CPU, listen=lambda event: None)  # and goes on here all the same


def test_nothing_is_overwritten_without_being_reported(here):
    run = trained(here)
    assert call("convert", run, "--to", "nanogpt", "--out", "out").code == 0
    Path("out/mine.txt").write_text("mine")
    before = Path("out/ckpt.pt").read_bytes()
    Path("out/ckpt.pt").write_bytes(b"changed")
    assert call("convert", run, "--to", "nanogpt", "--out", "out").code == 2
    assert Path("out/ckpt.pt").read_bytes() == b"changed"
    assert call("convert", run, "--to", "nanogpt", "--out", "out", "--overwrite").code == 0
    assert len(Path("out/ckpt.pt").read_bytes()) == len(before)
    assert Path("out/mine.txt").read_text() == "mine"
    assert call("convert", "out/ckpt.pt", "--to", run).code == 2
    assert call("convert", "out/ckpt.pt", "--to", "out").code == 2
    assert not list(here.glob(".*.tmp"))


def test_bytes_leave_as_latin_1_and_come_back_as_bytes(here):
    run = trained(here, tokenizer="byte")
    told = call("convert", run, "--to", "nanogpt", "--out", "out")
    assert told.code == 0
    assert "Latin-1" in told.out
    meta = pickle.loads(Path("out/meta.pkl").read_bytes())
    assert (meta["vocab_size"], meta["stoi"]["A"], meta["itos"][0xE9]) == (256, 65, "é")
    nanostudy.convert("out/ckpt.pt", "again", corpus=str(here / "small.txt"), **ON_CPU)
    assert load_weights(Path("again")).tokenizer.kind == "byte"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("nothing", "--to", "nanogpt"), "nothing"),
        (("nothing.pt", "--to", "run"), "nothing.pt"),
        (("mine", "--to", "onnx"), "nanogpt"),
        (("out/ckpt.pt", "--to", "huggingface"), "first, with --to RUN"),
        (("mine",), "--to"),
        (("mine", "--to", "nanogpt", "max_iters=3"), "settings"),
        (("mine", "--to", "nanogpt", "--meta", "meta.pkl"), "meta"),
        (("mine", "--to", "nanogpt", "--which", "first"), "best or last"),
        (("mine", "--to", "nanogpt", "--out", "small.txt"), "small.txt"),
        (("out/ckpt.pt", "--to", "new", "--which", "best"), "which"),
        (("out/ckpt.pt", "--to", "new", "meta=out/meta.pkl"), "write --meta"),
        (("out/ckpt.pt", "--to", "new", "--meta", "missing.pkl"), "missing.pkl"),
        (("out/ckpt.pt", "--to", "new", "--meta", "out/meta.pkl", "--characters", "small.txt"), "Give one"),
        (("small.txt", "--to", "new"), "small.txt"),
    ],
)
def test_mistakes_are_reported(here, args, words):
    trained(here)
    nanostudy.convert("mine", "nanogpt", out="out")
    told = call("convert", *args)
    assert told.code in (1, 2)
    assert words in told.err
    assert "Traceback" not in told.err
    assert not Path("new").exists()


def test_a_setting_wrong_in_value_is_a_usage_error(here):
    put(here, nanogpt_checkpoint(False))
    with pytest.raises(UsageError, match="dropout"):
        nanostudy.convert("out/ckpt.pt", "run", dropout="much")
