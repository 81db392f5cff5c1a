"""Studies that never ran: results from a formula, with planted effects and known noise."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nanostudy.analysis.frames import EVALUATIONS, TRAINING, Results, experiments_frame
from nanostudy.model.config import GPTConfig, count_parameters, flops_per_token
from nanostudy.settings import Experiment
from nanostudy.training.run_folder import EVALUATION_COLUMNS, TRAINING_COLUMNS

REAL = {"n_layer": [2, 4], "n_embd": [64, 128], "dropout": [0.0, 0.2], "learning_rate": [1e-3, 4e-3]}
FIXED = {"block_size": 64, "eval_interval": 200}
VOCABULARY, TRAIN_TOKENS = 65, 1_003_854


def real_losses() -> np.ndarray:
    """(cells of REAL, seeds): the losses of 128 real trainings, 500 updates each on tiny Shakespeare."""
    return pd.read_csv(Path(__file__).parent / "fixtures" / "seed-losses.csv")["val_loss"].to_numpy().reshape(16, 8)


def real_deviations() -> np.ndarray:
    """(cells of REAL, 8): times standard normal numbers (8, seeds), noise with the covariance that those trainings had."""
    losses = real_losses()
    return (losses - losses.mean(axis=1, keepdims=True)) / math.sqrt(7)


def planted(
    effects: Mapping[str, float], factors: Mapping[str, Sequence[Any]], mean: float = 2.0
) -> Callable[..., float]:
    """A loss with these effects of two-level factors: upper level minus lower; "a x b": half the difference of differences."""

    def loss(settings: Mapping[str, Any]) -> float:
        total = mean
        for term, effect in effects.items():
            signs = (1 if settings[name] == factors[name][-1] else -1 for name in term.split(" x "))
            total += effect / 2 * math.prod(signs)
        return total

    return loss


def synthetic(
    factors: Mapping[str, Sequence[Any]],
    loss: Callable[[Mapping[str, Any]], float] | Mapping[str, float] = lambda settings: 2.0,
    *,
    seeds: Sequence[int] | None = (1,),
    noise: float = 0.0,
    block_noise: float = 0.0,
    draw: int = 0,
    diverged: Sequence[int] = (),
    waiting: Sequence[int] = (),
    keep: Callable[[Mapping[str, Any]], bool] = lambda settings: True,
    curves: bool = False,
    **settings: Any,
) -> Results:
    """Every combination, the last factor varying fastest, with each seed (None: one seed an experiment, its number).

    `loss` is a function of the settings, or planted effects. `noise` is the standard deviation of what each experiment
    adds, `block_noise` of what all experiments of a seed share; `draw` seeds both. `diverged` and `waiting` are ids,
    from 1; `keep` says which cells there are. The training loss is 0.05 lower than the validation loss.
    """
    expected = loss if callable(loss) else planted(loss, factors)
    random = np.random.default_rng(draw)
    shared = {seed: block_noise * random.standard_normal() for seed in seeds or ()}
    cells = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
    cells = [cell for cell in cells if keep(cell)]
    combinations = [{**cell, "seed": seed} for cell in cells for seed in (seeds or (None,))]
    records, evaluations, training = [], [], []
    for id, cell in enumerate(combinations, start=1):
        seed = id if cell["seed"] is None else cell["seed"]
        experiment = Experiment(**{**FIXED, **settings, **cell, "seed": seed})
        values = {name: "none" if value is None else value for name, value in experiment.as_dict().items()}
        value = expected(values) + shared.get(seed, 0.0) + noise * random.standard_normal()
        status = "diverged" if id in diverged else "waiting" if id in waiting else "finished"
        tokens = experiment.max_iters * experiment.tokens_per_update
        shape = GPTConfig.of(experiment, VOCABULARY)
        name = f"{experiment.name}_{id}"
        done = status != "waiting"
        records.append(
            {
                "id": id,
                "name": name,
                "part": "all",
                "status": status,
                "reason": "loss became NaN" if status == "diverged" else None,
                "source": "nanostudy",
                "identity": f"{draw:08x}{id:08x}",
                **values,
                "parameters": count_parameters(shape).total,
                "device": "cpu",
                "precision": "fp32",
                "threads": 1,
                "members": 1,
                "corpus_sha256": "0" * 64,
            }
        )
        if done:
            records[-1] |= {
                "train_loss": value - 0.05,
                "val_loss": value,
                "best_step": experiment.max_iters,
                "best_val_loss": value,
                "updates": experiment.max_iters,
                "tokens": tokens,
                "epochs": tokens / TRAIN_TOKENS,
                "flops": flops_per_token(shape) * tokens,
                "seconds": tokens / 10_000,
            }
        if done and curves:  # a straight fall from ln 65 to the loss
            for step in range(0, experiment.max_iters + 1, experiment.eval_interval):
                share = step / experiment.max_iters
                at = (1 - share) * math.log(VOCABULARY) + share * value
                evaluations.append((name, step, share * tokens, share * tokens / 10_000, at - 0.05 * share, at))
            training += [(name, step, value, 1e-3, 1.0, 10_000.0) for step in range(10, experiment.max_iters + 1, 10)]
    return Results(
        "synthetic",
        experiments_frame(records),
        pd.DataFrame(evaluations, columns=list(EVALUATIONS)),
        pd.DataFrame(training, columns=list(TRAINING)),
    )


def search(
    experiments: int,
    loss: Callable[[Mapping[str, Any]], float] = lambda settings: 2.0,
    *,
    seed: int | None = 1337,
    noise: float | Callable[[Mapping[str, Any]], float] = 0.01,
    draw: int = 0,
) -> Results:
    """A random search over four settings, each point run once; `seed`: of all, or None for a seed an experiment."""
    random, records = np.random.default_rng(draw), []
    for id in range(1, experiments + 1):
        drawn = {
            "n_embd": int(random.choice([64, 96, 128, 192, 256])),
            "dropout": float(random.uniform(0, 0.3)),
            "learning_rate": float(10 ** random.uniform(-4, -2)),
            "weight_decay": float(random.uniform(0, 1)),
        }
        experiment = Experiment(**{**FIXED, **drawn, "n_head": 4, "seed": id if seed is None else seed})
        values = {name: "none" if value is None else value for name, value in experiment.as_dict().items()}
        value = loss(values) + (noise(values) if callable(noise) else noise) * random.standard_normal()
        size = count_parameters(GPTConfig.of(experiment, VOCABULARY)).total
        about = {"id": id, "name": f"point_{id}", "part": "all", "status": "finished", "source": "nanostudy"}
        losses = {"train_loss": value - 0.05, "val_loss": value, "parameters": size}
        records.append({**about, "identity": f"{draw:08x}{id:08x}", **values, **losses})
    return Results("search", experiments_frame(records))


def with_curves(results: Results, rows: Sequence[tuple[int, int, float, float, float]]) -> Results:
    """The results with these evaluations: (number of the experiment, step, tokens, seconds, loss)."""
    names = list(results.experiments.index)
    evaluations = [(names[i], step, tokens, seconds, loss, loss) for i, step, tokens, seconds, loss in rows]
    return replace(results, evaluations=pd.DataFrame(evaluations, columns=list(EVALUATIONS)))


def with_losses(results: Results, losses: Sequence[float]) -> Results:
    """The same experiments with these validation losses, in order."""
    table = results.experiments.assign(val_loss=np.asarray(losses, dtype=float))
    return replace(results, experiments=table)


def evaluations(
    *val_losses: float, train_losses: Sequence[float] | None = None, interval: int = 100
) -> list[dict[str, float]]:
    """Rows of an evaluations.csv."""
    return [
        dict(
            zip(
                EVALUATION_COLUMNS,
                (i * interval, i * interval * 32, i * 1.5, train, val, train / 2, val / 2),
                strict=True,
            )
        )
        for i, (val, train) in enumerate(zip(val_losses, train_losses or val_losses, strict=True))
    ]


def log(*norms: float, interval: int = 10) -> list[dict[str, float]]:
    """Rows of a training.csv with these gradient norms."""
    return [
        dict(zip(TRAINING_COLUMNS, (i * interval, 2.0, 1e-3, norm, 1000.0 * i), strict=True))
        for i, norm in enumerate(norms, 1)
    ]
