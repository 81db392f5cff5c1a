"""Trainings of stacks: against a loop of plain torch modules, against each experiment alone, through sickness and resumes."""

import dataclasses
import hashlib
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import cpu, jobs_of, small
from oracles import Masks, plain_of

from nanostudy.data.corpus import Corpus, Split, window_starts
from nanostudy.errors import NanostudyError, OutOfMemory
from nanostudy.model.config import GPTConfig, count_parameters
from nanostudy.model.engine import FIRST_LOSS_SCALE, Batch, State, train_step
from nanostudy.model.gpt import forward, initial_parameters, named_views
from nanostudy.model.optim import StepSettings, learning_rate
from nanostudy.model.randomness import dropout_keys, keep_mask, offsets
from nanostudy.training import evaluation
from nanostudy.training import train as trainer
from nanostudy.training.events import Evaluated, Finished, Logged, Progress, Saving, Started, Stopped
from nanostudy.training.stack import members
from nanostudy.training.train import train

COMPANY = (  # they differ in every number
    small(seed=1, dropout=0.1, learning_rate=1e-2, max_iters=26, eval_interval=10),
    small(seed=2, dropout=0.0, learning_rate=3e-2, weight_decay=1.0, beta1=0.5, max_iters=20, eval_interval=7),
    small(seed=3, dropout=0.4, learning_rate=3e-3, beta2=0.9, grad_clip=0.0, max_iters=23, warmup_iters=0),
    small(seed=4, dropout=0.1, learning_rate=1e-2, beta1=0.0, grad_clip=0.1, decay_lr=False, max_iters=21),
    small(seed=6, dropout=0.0, learning_rate=0.1, max_iters=27, eval_interval=1, warmup_iters=0),  # best in the middle
)

pytestmark = pytest.mark.usefixtures("small_evaluations")


@pytest.fixture
def run(corpus, machine, tmp_path):
    """Trains jobs to the end, all at once unless told otherwise, and returns the events."""
    number = itertools.count()

    def run(jobs, machine=machine, corpus=corpus, save_every=math.inf, **options):
        path = tmp_path / f"{next(number)}.safetensors"
        return list(train(jobs, corpus, machine, path, save_every=save_every, **options))

    return run


def story(events):
    """The events of trainings in order and to the bit, without times and speeds. As text, in which NaN equals NaN."""
    lines = []
    for event in events:
        if isinstance(event, Logged | Evaluated | Finished):
            facts = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
            if isinstance(event, Finished):
                measures = {name: value for name, value in event.result.measures.items() if name != "seconds"}
                facts["result"] = dataclasses.replace(event.result, measures=measures)
            for name, fact in facts.items():
                if isinstance(fact, torch.Tensor):
                    facts[name] = hashlib.sha256(fact.numpy().tobytes()).hexdigest()
            lines.append(repr({name: fact for name, fact in facts.items() if "second" not in name}))
    return lines


def of(events, kind, name="job0"):
    return [event for event in events if isinstance(event, kind) and event.name == name]


def losses(events, name="job0"):
    return [event.loss for event in of(events, Logged, name)]


def last(events, name="job0") -> Finished:
    (finished,) = of(events, Finished, name)
    return finished


# --- against plain torch


@pytest.mark.parametrize(("dropout", "parts"), [(0.0, 1), (0.3, 1), (0.3, 2)])
def test_training_equals_a_loop_of_plain_modules(run, corpus, dropout, parts):
    """nanoGPT's loop, spelt out: batches, dropout, accumulation, clipping, schedule, torch.optim.AdamW, 20 updates.

    Bound: 1e-5 of a loss; largest deviation seen: 2e-7.
    """
    e = small(seed=5, dropout=dropout, gradient_accumulation_steps=parts, learning_rate=1e-2, grad_clip=0.7, bias=True)
    config = GPTConfig.of(e, corpus.tokenizer.vocab_size)
    plain = plain_of(initial_parameters(config, [5])[0], config)
    decayed, rest = ([p for p in plain.parameters() if (p.dim() >= 2) == matrix] for matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": e.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(e.beta1, e.beta2))
    tokens, everything = torch.from_numpy(corpus.train.tokens.astype(np.int64)), range(4 * parts)
    expected, norms = [], []
    for step in range(e.max_iters):
        starts = offsets(e.seed, step, everything, len(everything), len(tokens) - 8)
        (keys,) = dropout_keys([e.seed], [step], everything, len(everything))
        optimizer.zero_grad()
        total = 0.0
        for at in torch.arange(4 * parts).chunk(parts):
            x, y = (torch.stack([tokens[starts[i] + shift :][:8] for i in at]) for shift in (0, 1))
            masks = Masks(keys[at], dropout) if dropout else None
            loss = F.cross_entropy(plain(x, masks).flatten(0, 1), y.flatten()) / parts
            loss.backward()
            total += loss.item()
        expected.append(total)
        norms.append(torch.nn.utils.clip_grad_norm_(plain.parameters(), e.grad_clip).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(e, step)
        optimizer.step()
    logged = of(run(jobs_of(e)), Logged)
    assert [event.loss for event in logged] == pytest.approx(expected, rel=1e-5)
    assert [event.grad_norm for event in logged] == pytest.approx(norms, rel=1e-4)
    assert [event.learning_rate for event in logged] == [learning_rate(e, step) for step in range(e.max_iters)]
    assert expected[-1] < expected[0] - 0.2  # it learnt
    assert max(norms) > e.grad_clip  # and was clipped


# --- in company and alone


@pytest.fixture
def drawn(on_batches):
    """What every micro-batch held, by seed, step and place: inputs, targets, and the masks of two dropouts."""
    held = {}

    def record(_, experiments, steps, sequences, batch):
        drops = list(batch.dropout or ())
        masks = [keep_mask(*drops[s][:3], (128,), (1,)).unflatten(0, (len(steps), -1)) for s in (1, 5) if drops]
        for m, (e, step) in enumerate(zip(experiments, steps, strict=True)):
            key = e.seed, step, sequences
            assert key not in held
            held[key] = [t[m].clone() for t in (batch.inputs, batch.targets, *(masks if e.dropout else ()))]

    on_batches(record)
    return held


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 2e-2)])
@pytest.mark.parametrize("width", [5, 2])
def test_an_experiment_is_itself_in_company(run, drawn, precision, bound, width):
    """Batches and masks to the bit; the losses of the first 20 updates, and the last evaluation, within a bound.

    The relative bounds allow for another order of additions in the products; on the machine where this was written all were
    equal to the bit. With width 2, three experiments take slots that others left.
    """
    machine = cpu(precision)
    together = run(jobs_of(*COMPANY), machine, width=width)
    in_company = dict(drawn)
    assert len(in_company) == sum(e.max_iters for e in COMPANY)
    drawn.clear()
    for job in jobs_of(*COMPANY):
        alone = run([job], machine)
        mine, theirs = losses(together, job.name), losses(alone, job.name)
        assert len(mine) == len(theirs) == job.experiment.max_iters
        assert mine[:20] == pytest.approx(theirs[:20], rel=bound)
        assert [e.step for e in of(together, Evaluated, job.name)] == [e.step for e in of(alone, Evaluated, job.name)]
        assert of(together, Evaluated, job.name)[-1].val_loss == pytest.approx(
            of(alone, Evaluated, job.name)[-1].val_loss, rel=bound
        )
        if precision == "fp32":
            best, best_alone = last(together, job.name), last(alone, job.name)
            assert best.result.best_step == best_alone.result.best_step
            torch.testing.assert_close(best.best_weights, best_alone.best_weights, rtol=0, atol=1e-4)
    assert drawn.keys() == in_company.keys()
    for key, tensors in drawn.items():
        assert len(tensors) == len(in_company[key])
        assert all(torch.equal(one, other) for one, other in zip(tensors, in_company[key], strict=True))


@pytest.mark.parametrize("width", [4, 3])
def test_members_may_differ_in_their_number_of_heads(run, width):
    """As alone, within rounding; with width 3 an experiment takes the slot of one with as many heads, later of any."""
    experiments = [small(seed=i, n_head=n, dropout=0.1, max_iters=12 + i) for i, n in enumerate((4, 1, 2, 1), 1)]
    together = run(jobs_of(*experiments), width=width)
    for job in jobs_of(*experiments):
        alone = run([job])
        assert losses(together, job.name) == pytest.approx(losses(alone, job.name), rel=1e-5)
        for which in ("last_weights", "best_weights"):
            mine, theirs = (getattr(last(events, job.name), which) for events in (together, alone))
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
        ours, own = (last(events, job.name).result.context_losses for events in (together, alone))
        assert ours == pytest.approx(own, rel=1e-5)
        ends = [of(events, Evaluated, job.name)[-1].val_loss for events in (together, alone)]
        assert ends[0] == pytest.approx(ends[1], rel=1e-5)
    begun = [event.name for event in together if isinstance(event, Started)]
    assert begun[:width] == sorted(begun[:width], key=lambda name: experiments[int(name[-1])].n_head)


def test_bf16_is_near_fp32(run):
    """bf16 keeps 8 bits: the losses of 20 updates within 2%. Largest deviation seen: 0.5%."""
    (job,) = jobs_of(small(seed=2, learning_rate=1e-2, dropout=0.1))
    assert losses(run([job], cpu("bf16"))) == pytest.approx(losses(run([job])), rel=0.02)


def test_every_number_matters(run):
    """What the comparison above compares: another seed, dropout or setting of the optimiser gives other losses."""
    base = COMPANY[0]
    others = [
        {"seed": 9},
        {"dropout": 0.2},
        {"learning_rate": 2e-2},
        {"weight_decay": 0.9},
        {"beta1": 0.5},
        {"beta2": 0.5},
    ]
    jobs = jobs_of(base, *(dataclasses.replace(base, **change) for change in others))
    events = run(jobs)
    curves = [tuple(losses(events, job.name)) for job in jobs]
    assert len(set(curves)) == len(curves)


# --- slots


def test_every_experiment_finishes_once_and_does_its_updates(run):
    lengths = [5, 0, 12, 3, 3, 8, 1]
    jobs = jobs_of(*(small(seed=i, max_iters=n, eval_interval=4) for i, n in enumerate(lengths)))
    events = run(jobs, width=3)
    running = set()
    for event in events:
        if isinstance(event, Started):
            assert (event.step, event.evaluated_at) == (0, -1)
            running.add(event.name)
            assert len(running) <= 3
        elif isinstance(event, Finished):
            running.remove(event.name)
        else:
            assert event.name in running
    for job, n in zip(jobs, lengths, strict=True):
        finished = last(events, job.name)
        assert (finished.result.updates, finished.result.skipped, finished.result.reason) == (n, 0, None)
        assert finished.result.tokens == n * 4 * 8
        assert len(of(events, Started, job.name)) == 1
        assert [e.step for e in of(events, Logged, job.name)] == list(range(1, n + 1))
        evaluations = of(events, Evaluated, job.name)
        assert [e.step for e in evaluations] == sorted({*range(0, n, 4), n})
        assert [e.tokens for e in evaluations] == [e.step * 4 * 8 for e in evaluations]


def test_no_updates_leave_the_initial_weights(run, corpus):
    events = run(jobs_of(small(seed=3, max_iters=0)))
    fresh = initial_parameters(GPTConfig.of(small(), corpus.tokenizer.vocab_size), [3])
    assert torch.equal(last(events).last_weights, fresh)
    assert torch.equal(last(events).best_weights, fresh)


def test_initial_weights_of_a_job_are_where_it_starts(run):
    """Trained on from another's weights: its first evaluation is the other's last. The row that was passed stays as it was."""
    first = run(jobs_of(small(seed=1, learning_rate=1e-2)))
    row = last(first).last_weights[0].clone()
    jobs = [
        dataclasses.replace(job, initial=row) for job in jobs_of(small(seed=2, max_iters=3), small(seed=3, max_iters=1))
    ]
    events = run(jobs, width=1)
    for job in jobs:
        assert of(events, Evaluated, job.name)[0].val_loss == of(first, Evaluated)[-1].val_loss
    assert torch.equal(row, last(first).last_weights[0])


def test_best_weights_are_those_of_the_best_evaluation(run):
    """A constant, far too high rate: the loss falls, then rises. Training up to the best step gives those weights."""
    settings = {"seed": 1, "learning_rate": 0.1, "decay_lr": False, "warmup_iters": 0}
    jobs = jobs_of(small(**settings, max_iters=25, eval_interval=1), small(seed=2, max_iters=25))
    events = run(jobs)
    by_loss = {e.val_loss: e.step for e in reversed(of(events, Evaluated))}
    best = last(events).result.best_step
    assert best == by_loss[min(by_loss)]
    assert 0 < best < 25
    until_best = last(run(jobs_of(small(**settings, max_iters=best), small(seed=2, max_iters=best))))
    assert torch.equal(last(events).best_weights, until_best.last_weights)


# --- evaluation


def test_evaluating_changes_nothing(run, monkeypatch):
    """However often, however often logged: the same weights and losses, bit for bit."""
    monkeypatch.setitem(evaluation.TOKENS, "cpu", 8192)  # one batch, however many members are evaluated together
    often = run(jobs_of(*(dataclasses.replace(e, eval_interval=1) for e in COMPANY)))
    seldom = run(jobs_of(*(dataclasses.replace(e, eval_interval=1000, log_interval=1000) for e in COMPANY)))
    for name in ("job0", "job1", "job2", "job3", "job4"):
        assert torch.equal(last(often, name).last_weights, last(seldom, name).last_weights)
        assert losses(often, name)[-1:] == losses(seldom, name)
        ends = [of(events, Evaluated, name)[-1] for events in (often, seldom)]
        assert (ends[0].train_loss, ends[0].val_loss) == (ends[1].train_loss, ends[1].val_loss)


def counting_corpus(corpus: Corpus, train_tokens: int, val_tokens: int) -> Corpus:
    """Token i is at place i, so that a token says where it was read."""
    splits = (Split(np.arange(n, dtype=np.uint16), n, None) for n in (train_tokens, val_tokens))
    return dataclasses.replace(corpus, **dict(zip(("train", "val"), splits, strict=True)))


def read_windows(corpus, split, *more):
    """(inputs, targets) of windows of 8 tokens, and of one that pads a batch."""
    starts = window_starts(corpus, split, 8, *more)
    text = torch.from_numpy(corpus.splits[split].tokens)
    inputs, targets = evaluation.windows_at(text, torch.tensor([*starts, len(text)]), 8)
    assert (targets[-1] == -1).all()
    assert inputs.shape == targets.shape == (len(starts) + 1, 8)
    return inputs[:-1].numpy(), targets[:-1].numpy()


@pytest.mark.parametrize("val_tokens", [9, 10, 16, 17, 18, 100, 105])
def test_every_validation_token_but_the_first_is_a_target_once(corpus, val_tokens):
    inputs, targets = read_windows(counting_corpus(corpus, 500, val_tokens), "val")
    real = targets >= 0
    assert targets[real].tolist() == list(range(1, val_tokens))
    assert (inputs[real] == targets[real] - 1).all()
    assert (targets[~real] == -1).all()
    assert (inputs[:, 0] % 8 == 0).all()
    assert not (real[:, 1:] & ~real[:, :-1]).any()  # what is missing is at the end


@pytest.mark.parametrize(("train_tokens", "val_tokens"), [(500, 100), (505, 51), (100, 100), (40, 100)])
def test_training_windows_are_as_many_and_spread_evenly(corpus, train_tokens, val_tokens):
    inputs, targets = read_windows(counting_corpus(corpus, train_tokens, val_tokens), "train")
    real = targets >= 0
    assert (inputs[real] == targets[real] - 1).all()
    starts = inputs[real[:, 0], 0]
    available = math.ceil((train_tokens - 1) / 8)
    assert len(starts) == min(math.ceil((val_tokens - 1) / 8), available)
    assert (starts % 8 == 0).all()
    gaps = np.diff(starts) // 8
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1
    assert starts[0] == 0
    assert starts[-1] // 8 + gaps.max() >= available  # up to the end


@pytest.mark.parametrize(("wanted", "windows"), [(1, 1), (40, 5), (41, 6), (800, 13)])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_subset_of_windows_is_fixed_and_spread_evenly(corpus, split, wanted, windows):
    starts = window_starts(counting_corpus(corpus, 500, 100), split, 8, wanted)
    available = math.ceil(({"train": 500, "val": 100}[split] - 1) / 8)
    assert starts.tolist() == [8 * (i * available // windows) for i in range(windows)]


def mean_by_hand(row_1P, config, tokens, context, starts=None):
    """One window after another, each target's surprisal added up in double precision."""
    tokens, total, count = torch.from_numpy(tokens.astype(np.int64)), 0.0, 0
    plain = plain_of(row_1P[0], config)
    for start in range(0, len(tokens) - 1, context) if starts is None else starts:
        window = tokens[start : start + context + 1]
        with torch.no_grad():
            surprisal = -plain(window[None, :-1])[0].log_softmax(-1)
        total += sum(surprisal[i, token].item() for i, token in enumerate(window[1:]))
        count += len(window) - 1
    return total / count


def test_losses_and_contexts_equal_a_loop_by_hand(run, corpus, machine, monkeypatch):
    """Both splits, and each fixed context, for members with other weights; also where a batch is not full."""
    monkeypatch.setitem(evaluation.TOKENS, "cpu", 64 * 2 * 2)
    experiments = [small(seed=i, block_size=64, max_iters=6, learning_rate=1e-2, warmup_iters=0) for i in (1, 2)]
    events, val, text = run(jobs_of(*experiments)), corpus.val.tokens, corpus.train.tokens
    config = GPTConfig.of(experiments[0], corpus.tokenizer.vocab_size)
    available = range(0, len(text) - 1, 64)
    count = math.ceil((len(val) - 1) / 64)
    spread = [available[i * len(available) // count] for i in range(count)]
    for name in ("job0", "job1"):
        weights, end = last(events, name).last_weights, of(events, Evaluated, name)[-1]
        assert end.val_loss == pytest.approx(mean_by_hand(weights, config, val, 64), rel=1e-5)
        assert end.train_loss == pytest.approx(mean_by_hand(weights, config, text, 64, spread), rel=1e-5)
        by_hand = {context: mean_by_hand(weights, config, val, context) for context in (32, 64)}
        assert last(events, name).result.context_losses == pytest.approx(by_hand, rel=1e-5)


def test_the_windows_of_the_last_evaluation_are_a_loop_by_hand(run, corpus, machine, monkeypatch):
    """Each window's loss, of every split and context, in the order of the text; of members that end at different times, too."""
    monkeypatch.setitem(evaluation.TOKENS, "cpu", 64 * 2 * 2)
    lengths = {"job0": 6, "job1": 4}
    experiments = [small(seed=i, block_size=64, max_iters=n, eval_interval=3) for i, n in enumerate(lengths.values())]
    held_out = dataclasses.replace(corpus, test=Split(corpus.val.tokens[:700][::-1].copy(), 700, None))
    events = run(jobs_of(*experiments), corpus=held_out)
    config = GPTConfig.of(experiments[0], corpus.tokenizer.vocab_size)
    for name, length in lengths.items():
        finished, evaluated = last(events, name), of(events, Evaluated, name)
        assert [set(event.windows) for event in evaluated[:-1]] == [set()] * (len(evaluated) - 1)
        assert evaluated[-1].step == length
        windows = {**evaluated[-1].windows, **finished.windows}
        assert set(windows) == {"train", "val", "val_at_32", "test"}
        for which, tokens, context in (
            ("val", held_out.val.tokens, 64),
            ("val_at_32", held_out.val.tokens, 32),
            ("test", held_out.test.tokens, 64),
        ):
            starts = range(0, len(tokens) - 1, context)
            each = [mean_by_hand(finished.last_weights, config, tokens, context, [start]) for start in starts]
            assert windows[which].losses == pytest.approx(np.array(each), rel=1e-4)
            assert windows[which].targets.tolist() == [min(context, len(tokens) - 1 - start) for start in starts]
        result = finished.result
        assert windows["train"].mean == pytest.approx(evaluated[-1].train_loss, rel=1e-6)
        assert windows["val"].mean == pytest.approx(evaluated[-1].val_loss, rel=1e-6)
        assert windows["val_at_32"].mean == pytest.approx(result.context_losses[32], rel=1e-6)
        assert windows["test"].mean == pytest.approx(result.test_loss, rel=1e-6)
        whole = mean_by_hand(finished.last_weights, config, held_out.test.tokens, 64)
        assert result.test_loss == pytest.approx(whole, rel=1e-5)


def test_a_held_out_part_changes_no_training(run, corpus):
    """Neither weights nor losses: nothing reads it before the end."""
    held_out = dataclasses.replace(corpus, test=Split(corpus.val.tokens[::-1].copy(), len(corpus.val.tokens), None))
    with_test, without = (run(jobs_of(small(dropout=0.1)), corpus=one) for one in (held_out, corpus))
    assert torch.equal(last(with_test).last_weights, last(without).last_weights)
    assert [event.val_loss for event in of(with_test, Evaluated)] == [e.val_loss for e in of(without, Evaluated)]
    assert last(without).result.test_loss is None
    assert "test_loss" not in last(without).result.to_run()


def test_curves_on_a_subset_end_with_an_exact_evaluation(run, corpus):
    """The weights, the final losses and the scores are those of exact evaluations; the losses before are of the subset, and the
    best of them is found on the subset as well.
    """
    exact = [small(seed=i, max_iters=20, eval_interval=4, learning_rate=3e-2) for i in (1, 2, 3)]
    mixed = [dataclasses.replace(e, eval_tokens=24 if e.seed > 1 else None) for e in exact]
    whole, curves = run(jobs_of(*exact)), run(jobs_of(*mixed))
    available = range(0, len(corpus.val.tokens) - 1, 8)
    subset = [available[i * len(available) // 3] for i in range(3)]
    config = GPTConfig.of(exact[0], corpus.tokenizer.vocab_size)
    for name in ("job0", "job1", "job2"):
        before, after = last(whole, name), last(curves, name)
        assert torch.equal(before.last_weights, after.last_weights)
        rows, exact_rows = of(curves, Evaluated, name), of(whole, Evaluated, name)
        assert rows[-1].val_loss == pytest.approx(exact_rows[-1].val_loss, rel=1e-6)
        assert rows[-1].train_loss == pytest.approx(exact_rows[-1].train_loss, rel=1e-6)
        assert after.result.context_losses == pytest.approx(before.result.context_losses)
        if name == "job0":
            assert [row.val_loss for row in rows] == pytest.approx([row.val_loss for row in exact_rows], rel=1e-6)
            continue
        assert all(row.val_loss != other.val_loss for row, other in zip(rows[:-1], exact_rows[:-1], strict=True))
        first = initial_parameters(config, [mixed[int(name[-1])].seed])
        assert rows[0].val_loss == pytest.approx(mean_by_hand(first, config, corpus.val.tokens, 8, subset), rel=1e-5)
        at_end = mean_by_hand(after.last_weights, config, corpus.val.tokens, 8, subset)
        on_subset = [*(row.val_loss for row in rows[:-1]), at_end]
        assert after.result["best_step"] == rows[on_subset.index(min(on_subset))].step


GROWTH = """
import re, sys
from pathlib import Path
from nanostudy.data.corpus import load_corpus
from nanostudy.settings import Experiment, Resources
from nanostudy.training.machine import resolve
from nanostudy.training.train import Job, _Training

def memory(kind):
    return int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

machine = resolve(Resources(device="cpu", threads=1, compile=sys.argv[2], precision="fp32"))
experiment = Experiment(corpus=sys.argv[1], n_layer=1, n_head=1, n_embd=8, block_size=32)
run = _Training([Job("a", experiment, "")], load_corpus(sys.argv[1]), machine, lambda: False)
stack = run.fresh(1)
before = memory("VmRSS")
run.evaluated(stack, [0], "val", batches=8)
early = memory("VmHWM")
run.evaluated(stack, [0], "val")
print(early - before, memory("VmHWM") - early)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads memory from /proc")
@pytest.mark.parametrize("compile", ["no", "auto"])
def test_an_evaluations_memory_depends_neither_on_the_text_nor_on_its_vocabulary(tmp_path, compile):
    """6,000 different characters, 60 batches."""
    draw, text = np.random.default_rng(0), tmp_path / "many.txt"
    ids = np.concatenate([np.arange(6000), draw.integers(6000, size=800_000)])
    text.write_text("".join(map(chr, (0x4E00 + ids).tolist())), encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", GROWTH, text, compile], capture_output=True, text=True, check=True)
    at_first, later = map(float, done.stdout.split())
    assert at_first < 400  # MiB
    assert later < 150  # it was 22 a batch


def test_an_evaluation_that_runs_out_of_memory_does_not_advise_a_smaller_batch(run, monkeypatch):
    def exhausted(*arguments):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr(evaluation, "window_losses", exhausted)
    with pytest.raises(OutOfMemory, match=r"in an evaluation, in which batch_size plays no part.*tokenizer=byte"):
        run(jobs_of(small()))


def test_contexts_that_fit(run):
    assert last(run(jobs_of(small(max_iters=0)))).result.context_losses == {}
    assert evaluation.contexts_within(31) == []
    assert evaluation.contexts_within(32) == [32]
    assert evaluation.contexts_within(300) == [32, 64, 128, 256]


# --- sickness


def sick(kind):
    """A job that becomes NaN after an update or two, or that is NaN or infinite from the start."""
    (job,) = jobs_of(small(seed=8, learning_rate=1e30 if kind == "rate" else 1e-2, decay_lr=False, warmup_iters=0))
    if kind != "rate":
        row = initial_parameters(GPTConfig.of(job.experiment, 13), [8])[0]
        row[100] = kind
        job = dataclasses.replace(job, initial=row)
    return dataclasses.replace(job, name="sick")


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ("rate", "fp32"),
        ("rate", "fp16"),
        (math.nan, "fp32"),
        (math.nan, "bf16"),
        (math.nan, "fp16"),
        (math.inf, "fp32"),
    ],
)
def test_a_sick_member_harms_nobody(run, kind, precision):
    """The same plan with a healthy one in its slot: the neighbours are equal to the bit. One that waits takes the slot."""
    machine, ill = cpu(precision), sick(kind)
    healthy = dataclasses.replace(ill, experiment=small(seed=8), initial=None)
    before, after, waiting = jobs_of(COMPANY[0], COMPANY[2], small(seed=30, max_iters=26))
    harmed = run([before, ill, after, waiting], machine, width=3)
    unharmed = run([before, healthy, after, waiting], machine, width=3)
    for name in (before.name, after.name):
        assert losses(harmed, name) == losses(unharmed, name)
        assert torch.equal(last(harmed, name).last_weights, last(unharmed, name).last_weights)
        assert torch.equal(last(harmed, name).best_weights, last(unharmed, name).best_weights)
        assert last(harmed, name).result.reason is None
    assert losses(harmed, waiting.name) == pytest.approx(losses(run([waiting], machine), waiting.name), rel=1e-5)
    end = last(harmed, "sick")
    assert "not finite" in end.result.reason
    assert last(unharmed, "sick").result.reason is None
    if kind == "rate":  # the weights after the last update that could be made
        assert 1 <= end.result.updates < 5
        cut = dataclasses.replace(ill, experiment=dataclasses.replace(ill.experiment, max_iters=end.result.updates))
        assert torch.equal(end.last_weights, last(run([cut], machine), "sick").last_weights)
        assert end.last_weights.isfinite().all()
        assert end.result.best_step == 0
    else:
        assert end.result.updates == 0
        assert torch.equal(end.last_weights.nan_to_num(7.0, 8.0), ill.initial[None].nan_to_num(7.0, 8.0))
        assert end.result.best_step is None


def test_a_sick_member_that_nobody_replaces(run):
    """The stack becomes smaller: the neighbours are equal up to rounding (1e-5) to a stack that never had it."""
    neighbours = jobs_of(*COMPANY[:2])
    events, without = run([*neighbours, sick("rate")]), run(neighbours)
    for job in neighbours:
        assert losses(events, job.name) == pytest.approx(losses(without, job.name), rel=1e-5)
    assert last(events, "sick").result.reason


@pytest.mark.parametrize("updates", [0, 1])
def test_whoever_ends_with_a_loss_that_is_not_finite_has_diverged(run, updates):
    """The last update, or the initial weights, may be what breaks it: no further step looks."""
    job = sick(math.nan) if updates == 0 else sick("rate")
    job = dataclasses.replace(job, experiment=dataclasses.replace(job.experiment, max_iters=updates))
    events = run([job])
    assert not math.isfinite(of(events, Evaluated, "sick")[-1].val_loss)
    assert last(events, "sick").result.reason


# --- fp16


def fp16_step(state, members, config, step=0):
    draw = torch.Generator().manual_seed(step)
    inputs, targets = (torch.randint(13, (members, 4, 8), generator=draw) for _ in range(2))
    rates = StepSettings(*StepSettings.rows([small(decay_lr=False)] * members, [step] * members))
    return train_step(state, [Batch(inputs, targets, None)], 4, rates, config, torch.float16)


def test_an_overflow_in_fp16_skips_the_update_of_its_member_alone():
    """A scale of 2**30 overflows: it is halved until it fits, and the member starts then. The neighbours know nothing of it."""
    config = GPTConfig.of(small(), 13)
    params = initial_parameters(config, [1, 2, 3])
    state, calm = State.fresh(params.clone()), State.fresh(params.clone())
    state.loss_scale[1] = scale = 2.0**30
    skipped = 0
    for step in range(20):
        before = state.rows([1])
        fp16_step(state, 3, config, step)
        fp16_step(calm, 3, config, step)
        neighbours, same = state.rows([0, 2]), calm.rows([0, 2])
        assert all(torch.equal(t, same.tensors()[name]) for name, t in neighbours.tensors().items())
        if state.updates[1] == before.updates[0]:
            skipped += 1
            now = state.rows([1]).tensors()
            assert all(torch.equal(now[name], before.tensors()[name]) for name in ("params", "exp_avg", "exp_avg_sq"))
            assert now["loss_scale"].item() == scale / 2**skipped
            assert now["good_steps"].item() == 0
    assert 8 <= skipped <= 15
    assert state.updates.tolist() == [20, 20 - skipped, 20]
    assert not state.diverged.any()
    assert calm.loss_scale.tolist() == [FIRST_LOSS_SCALE] * 3 == [65536.0] * 3


def test_a_scale_in_fp16_grows_member_by_member():
    """After 2000 good updates in a row, as torch.amp.GradScaler's."""
    config = GPTConfig.of(small(), 13)
    state = State.fresh(initial_parameters(config, [1, 2]))
    state.loss_scale[:] = 1024.0
    state.good_steps[:] = torch.tensor([1998, 0])
    fp16_step(state, 2, config)
    assert (state.loss_scale.tolist(), state.good_steps.tolist()) == ([1024.0, 1024.0], [1999, 1])
    fp16_step(state, 2, config)
    assert (state.loss_scale.tolist(), state.good_steps.tolist()) == ([2048.0, 1024.0], [0, 2])


def test_a_gradient_in_fp16_that_no_scale_can_hold_is_a_divergence():
    """A finite loss, and a gradient of about 1e6 in a type that ends at 65504."""
    config = GPTConfig.of(small(tie_embeddings=False), 13)
    state = State.fresh(initial_parameters(config, [1, 2]))
    views = named_views(state.params, config)
    for name, view in views.items():
        view[0] = {"norm.gain": 60.0}.get(name, 0.0)
    views["head"][0] = 1000.0 * torch.randn(13, 16, generator=torch.Generator().manual_seed(0)).sign()
    state.loss_scale[0] = 2.0
    before = state.params[0].clone()
    for scale in (1.0, 0.5, 0.25, 0.125, 0.0625):
        assert fp16_step(state, 2, config).loss[0].isfinite()
        assert state.loss_scale[0] == scale
        assert not state.diverged.any()
    fp16_step(state, 2, config)
    assert state.diverged.tolist() == [True, False]
    assert state.updates.tolist() == [0, 6]
    assert torch.equal(state.params[0], before)


def test_fp16_is_near_fp32(run):
    """fp16 keeps 11 bits: until an overflow skips an update, losses within 0.05%. Largest deviation seen: 0.006%."""
    (job,) = jobs_of(small(seed=2, learning_rate=1e-2, dropout=0.1))
    in_fp16 = run([job], cpu("fp16"))
    overflows = [not math.isfinite(e.grad_norm) for e in of(in_fp16, Logged)]
    same = [*overflows, True].index(True)
    assert same >= 5
    assert losses(in_fp16)[:same] == pytest.approx(losses(run([job]))[:same], rel=5e-4)
    assert (last(in_fp16).result.updates, last(in_fp16).result.skipped) == (20 - sum(overflows), sum(overflows))


# --- resuming

RESUMED = [
    small(
        seed=i,
        dropout=dropout,
        max_iters=length,
        learning_rate=rate,
        decay_lr=rate < 1,
        eval_interval=2,
        log_interval=2,
        gradient_accumulation_steps=2,
        batch_size=2,
    )
    for i, (length, dropout, rate) in enumerate(
        [(9, 0.1, 1.0), (4, 0.3, 1e-2), (7, 0.0, 0.1), (11, 0.2, 1.0), (5, 0.5, 1e-2)]
    )
]  # a rate of 1 only makes things worse, so that the best weights are not the last


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_stopping_and_resuming_changes_no_bit(corpus, run, tmp_path, precision):
    """Stopped after every second update, with dropout, accumulation, two slots, three waiting, and one that diverges."""
    jobs, machine = [*jobs_of(*RESUMED), sick("rate")], cpu(precision)
    uninterrupted, path, events = run(jobs, machine, width=2), tmp_path / "resumed", []
    for sessions in range(1, 100):  # noqa: B007
        part = []
        stop = lambda heard=part: sum(isinstance(e, Logged) for e in heard) >= 2  # noqa: E731
        for event in train(jobs, corpus, machine, path, width=2, save_every=math.inf, stop=stop):
            part.append(event)
        events += part
        stops = {e.name: e.step for e in part if isinstance(e, Stopped)}
        if not stops:
            break
        assert path.exists()
    assert sessions > 8
    assert story(events) == story(uninterrupted)
    assert [last(events, job.name).result.reason is None for job in jobs] == [True] * 5 + [False]
    assert any(last(events, job.name).result.best_step < job.experiment.max_iters - 3 for job in jobs[:5])


@pytest.fixture(scope="module")
def never_killed(corpus, tmp_path_factory):
    return story(train(jobs_of(*RESUMED), corpus, cpu(), tmp_path_factory.mktemp("never") / "killed", width=2))


@pytest.mark.parametrize("killed_after", [1, 9, 30, 43, 55, 71])
def test_a_kill_at_any_moment_changes_no_bit(corpus, machine, never_killed, tmp_path, killed_after):
    """The listener keeps what came before the last Saving event that it answered, as `train` promises. Killed twice."""
    jobs, path, kept = jobs_of(*RESUMED), tmp_path / "killed", []
    for events in (killed_after, 13):
        training = train(jobs, corpus, machine, path, width=2, save_every=0.0)
        heard = list(itertools.islice(training, events))
        training.close()
        # the file is written once an event other than Saving follows
        saves = [
            i for i, (a, b) in enumerate(itertools.pairwise(heard)) if isinstance(a, Saving) > isinstance(b, Saving)
        ]
        kept += heard[: saves[-1]] if saves else []
    assert path.exists()
    kept += train(jobs, corpus, machine, path, width=2)
    assert story(kept) == never_killed


def test_progress_has_each_members_loss_and_says_when_it_evaluates(corpus, machine, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer._Speed, "progress_due", lambda speed: True)
    events = list(train(jobs_of(small(eval_interval=10), small(seed=2)), corpus, machine, tmp_path / "stack"))
    logged = {(e.name, e.step): (e.loss, e.learning_rate) for e in events if isinstance(e, Logged)}
    training = [e for e in events if isinstance(e, Progress) and not e.evaluating]
    assert {(e.name, e.step): (e.loss, e.learning_rate) for e in training} == logged
    assert len({e.loss for e in training}) == 40  # each member's own
    for before, event in itertools.pairwise(events):
        if isinstance(event, Evaluated) and not isinstance(before, Evaluated):
            assert isinstance(before, Progress)
            assert before.evaluating
            assert before.step == event.step
    monkeypatch.setattr(trainer._Speed, "progress_due", lambda speed: False)
    unseen = train(jobs_of(small(eval_interval=10), small(seed=2)), corpus, machine, tmp_path / "unseen")
    assert story(events) == story(unseen)  # to be looked at changes no bit


def test_started_says_where_a_resume_stands(corpus, machine, tmp_path):
    heard, path = [], tmp_path / "stack"
    jobs = jobs_of(small(eval_interval=3), small(seed=2, eval_interval=5))
    for event in train(jobs, corpus, machine, path, stop=lambda: any(e.step == 6 for e in of(heard, Logged))):
        heard.append(event)
    events = (event for event in train(jobs, corpus, machine, path) if not isinstance(event, Progress))
    resumed = list(itertools.islice(events, 3))
    # it was stopped within the evaluation after update 6, which is made again
    assert resumed[:2] == [Started("job0", 6, 3, 2), Started("job1", 6, 5, 2)]
    assert isinstance(resumed[2], Evaluated)
    assert (resumed[2].name, resumed[2].step) == ("job0", 6)
    changed = next(iter(train(jobs, corpus, cpu("bf16"), path)))
    assert "fp32 -> bf16" in changed.notes[0]


def test_a_checkpoint_of_other_experiments_is_refused(corpus, machine, tmp_path):
    path = tmp_path / "stack"
    list(train(jobs_of(small()), corpus, machine, path, stop=lambda: True))
    before = path.read_bytes()
    (other,) = jobs_of(small(seed=2))
    with pytest.raises(NanostudyError, match="other experiments"):
        list(train([dataclasses.replace(other, identity="another")], corpus, machine, path))
    assert path.read_bytes() == before


def test_a_member_moves_with_its_whole_state(corpus):
    """Rows of a state go together, and a fresh one is zero but for its weights."""
    config = GPTConfig.of(small(), 13)
    state = State.fresh(initial_parameters(config, [1, 2, 3]))
    for step in range(3):
        fp16_step(state, 3, config, step)
    chosen = state.rows([2, 0])
    for name, tensor in chosen.tensors().items():
        assert torch.equal(tensor, state.tensors()[name][[2, 0]]), name
    chosen.params.fill_(0)
    assert state.params.abs().sum() > 0
    assert state.params.shape == (3, count_parameters(config).total)
    assert forward(named_views(state.params, config), torch.zeros(3, 1, 8, dtype=torch.int64), config).isfinite().all()


def test_two_that_diverge_at_one_evaluation_are_both_detected(corpus, machine, tmp_path):
    """Also when the first one's slot goes to another before the second one leaves."""
    config = GPTConfig.of(small(), corpus.tokenizer.vocab_size)
    ill = torch.full((count_parameters(config).total,), math.nan)
    jobs = jobs_of(small(max_iters=0), small(max_iters=0, seed=2), small(seed=3))
    jobs = [dataclasses.replace(job, initial=ill) if i < 2 else job for i, job in enumerate(jobs)]
    ends = {e.name: e for e in train(jobs, corpus, machine, tmp_path / "stack", width=2) if isinstance(e, Finished)}
    assert ends["job0"].result.reason
    assert ends["job1"].result.reason
    assert ends["job2"].result.reason is None


def test_a_stop_is_heard_between_the_micro_batches_of_an_update(corpus, machine, tmp_path):
    """An update may take a minute; one that was begun leaves no trace."""
    jobs, path = jobs_of(small(gradient_accumulation_steps=8, eval_interval=100)), tmp_path / "stack"
    whole = story(train(jobs, corpus, machine, tmp_path / "whole"))
    asked = itertools.count()
    heard = list(train(jobs, corpus, machine, path, stop=lambda: next(asked) > 40))
    assert 0 < heard[-1].step < 20
    assert isinstance(heard[-1], Stopped)
    assert story([*heard, *train(jobs, corpus, machine, path)]) == whole


def test_a_model_larger_than_the_memory_is_refused_before_it_is_made(run, monkeypatch):
    jobs = jobs_of(small())
    monkeypatch.setattr(trainer, "total_memory", lambda device: 1000)
    monkeypatch.setattr(trainer, "initial_parameters", lambda *_: pytest.fail("it was made"))
    with pytest.raises(OutOfMemory, match=r"parameters.*GiB at least; this machine's cpu has 0\.0 GiB.*smaller n_embd"):
        run(jobs)


# --- updates that are replayed


class Replaying(trainer.Updates):
    """As a GPU has them."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.replays = True


ENDING = [small(seed=seed, dropout=0.1, max_iters=n, eval_interval=5) for seed, n in enumerate((20, 6, 9, 12, 15), 1)]


def test_slots_that_ended_stay_idle_until_half_are(run, monkeypatch, recordings):
    """5 slots until 3 have ended, 2 until 1 has, then 1: three recordings in place of five, and the same results."""
    expected = run(jobs_of(*ENDING))
    monkeypatch.setattr(trainer, "Updates", Replaying)
    events, widths, step = [], [], trainer._Training.step
    monkeypatch.setattr(
        trainer._Training, "step", lambda self, stack: widths.append(len(stack.slots)) or step(self, stack)
    )
    events = run(jobs_of(*ENDING))
    assert recordings.made == 3
    assert widths == [5] * 12 + [2] * 3 + [1] * 5
    for name in (f"job{m}" for m in range(5)):
        assert story(of(events, Finished, name)) == story(of(expected, Finished, name))
        assert story(of(events, Logged, name)) == story(of(expected, Logged, name))
        assert len(of(events, Started, name)) == len(of(events, Finished, name)) == 1


def test_idle_slots_come_back_after_a_kill(corpus, machine, monkeypatch, recordings, tmp_path):
    """An update has the width again that it had, and nobody hears of those that have ended."""
    monkeypatch.setattr(trainer, "Updates", Replaying)
    uninterrupted = list(train(jobs_of(*ENDING), corpus, machine, tmp_path / "whole", save_every=math.inf))
    events, path = [], tmp_path / "killed"
    for event in train(jobs_of(*ENDING), corpus, machine, path, save_every=0):
        events.append(event)
        if isinstance(event, Logged) and event.step == 8 and event.name == "job4":
            break
    resumed = list(train(jobs_of(*ENDING), corpus, machine, path, save_every=math.inf))
    assert {event.name for event in resumed if isinstance(event, Started)} == {"job0", "job2", "job3", "job4"}
    assert resumed[0].members == 5
    assert "job1" not in members(path)[0]
    for name in ("job0", "job2", "job3", "job4"):
        assert story(of(resumed, Finished, name)) == story(of(uninterrupted, Finished, name))
