"""One prompt, many models: what they write after it, character by character, sampled as stacks.

All models draw the same random numbers, so that only their weights tell their texts apart. PyTorch is imported at the first
prompt.
"""

from __future__ import annotations

import codecs
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from nanostudy.errors import NanostudyError, UsageError
from nanostudy.settings import SamplingParams
from nanostudy.validation import settings_of

if TYPE_CHECKING:
    from torch import Tensor

    from nanostudy.data.tokenizer import Tokenizer
    from nanostudy.training.weights import Weights

MOST_MODELS = 64  # of one request
MOST_PARAMETERS = 2**28  # of these together, and of all models in memory: a gigabyte
MOST_CHARACTERS = 2000  # that one model writes
LONGEST_PROMPT = 2000  # characters
MOST_TEXTS = 256  # that can still be shared
AT_ONCE = 2  # requests
NUMBERS = {"seed": (0, 2**63 - 1), "length": (1, MOST_CHARACTERS)}


@dataclass(frozen=True)
class Request:
    """What to write; checked. `experiments` are numbers of a study's experiments."""

    experiments: tuple[int, ...]
    prompt: str
    seed: int
    length: int
    sampling: SamplingParams

    @staticmethod
    def of(content: Any) -> Request:
        """From a request's JSON. Raises UsageError."""
        if not isinstance(content, dict):
            raise UsageError("A request is an object.")
        known = ("experiments", "prompt", *NUMBERS, *(name for name in settings_of(SamplingParams) if name != "exact"))
        if unknown := sorted(set(content) - set(known)):
            raise UsageError(f"A request has no {unknown[0]!r}: {', '.join(known)}.")
        experiments, prompt = content.get("experiments"), content.get("prompt", "")
        if not are_numbers(experiments) or not experiments:
            raise UsageError("experiments are numbers, one at least.")
        if len(set(experiments)) != len(experiments) or len(experiments) > MOST_MODELS:
            raise UsageError(f"experiments are at most {MOST_MODELS} different ones.")
        if not isinstance(prompt, str) or len(prompt) > LONGEST_PROMPT:
            raise UsageError(f"prompt is a text of at most {LONGEST_PROMPT:,} characters.")
        numbers = {name: content.get(name, 1 if name == "seed" else 160) for name in NUMBERS}
        for name, (low, high) in NUMBERS.items():
            if type(numbers[name]) is not int or not low <= numbers[name] <= high:
                raise UsageError(f"{name} is a whole number from {low:,} to {high:,}.")
        sampling = {name: content[name] for name in settings_of(SamplingParams) if name in content}
        if not all(value is None or type(value) in (int, float) for value in sampling.values()):
            raise UsageError("temperature, top_k and top_p are numbers, or null.")
        return Request(tuple(experiments), prompt, **numbers, sampling=SamplingParams(**sampling))


def are_numbers(value: Any) -> TypeGuard[list[int]]:
    """Whether it is a list of whole numbers."""
    return isinstance(value, list) and all(type(number) is int for number in value)


@dataclass
class Text:
    """What one model wrote, until it is forgotten: the browser shares it by its number."""

    experiment: int
    prompt: str
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return self.prompt + "".join(self.pieces)


class Playground:
    """Models in memory, the last ones used, and the last texts that they wrote."""

    def __init__(self) -> None:
        self._models: OrderedDict[tuple[Path, int], Weights] = OrderedDict()
        self._lock = threading.Lock()
        self.texts: OrderedDict[int, Text] = OrderedDict()
        self._last = 0

    def write(self, request: Request, folders: Mapping[int, Path]) -> Iterator[dict[str, Any]]:
        """Yields plain values: first {texts: numbers of the texts, by experiment}; of each stack {stack: experiments, prompt:
        surprises of each at the prompt's tokens}; then {stack: its place, pieces, surprises} for each token, stacks in turn.

        A surprise is -ln p, of the model's own distribution (temperature 1, all tokens). Raises NanostudyError, UsageError.
        """
        models = {number: self.model(folders[number]) for number in request.experiments}
        if sum(weights.params.shape[1] for weights in models.values()) > MOST_PARAMETERS:
            raise UsageError(f"Together these models have more than {MOST_PARAMETERS:,} parameters: choose fewer.")
        stacks = [_Stack(numbers, [models[number] for number in numbers], request) for numbers in _of_one_shape(models)]
        texts = {number: self._begin(number, request.prompt) for number in request.experiments}
        yield {"texts": texts}
        for stack in stacks:
            yield {"experiments": stack.numbers, "prompt": stack.prompt_surprises()}
        for _ in range(request.length):
            for place, stack in enumerate(stacks):
                pieces, surprises = stack.step()
                for number, piece in zip(stack.numbers, pieces, strict=True):
                    if text := self.texts.get(texts[number]):
                        text.pieces.append(piece)
                yield {"stack": place, "pieces": pieces, "surprises": surprises}

    def model(self, folder: Path) -> Weights:
        """The best weights of a run, from memory where they are unchanged."""
        from nanostudy.training.weights import load_weights

        path = folder / "best.safetensors"
        try:
            key = path, os.stat(path).st_mtime_ns
        except OSError:
            raise NanostudyError(f"{folder.name} has no weights any more: the study does not keep them.") from None
        with self._lock:
            if key not in self._models:
                self._models[key] = load_weights(folder)
            self._models.move_to_end(key)
            loaded = self._models[key]
            while sum(weights.params.shape[1] for weights in self._models.values()) > MOST_PARAMETERS:
                self._models.popitem(last=False)
            return loaded

    def _begin(self, experiment: int, prompt: str) -> int:
        with self._lock:
            self._last += 1
            self.texts[self._last] = Text(experiment, prompt)
            while len(self.texts) > MOST_TEXTS:
                self.texts.popitem(last=False)
            return self._last


def _of_one_shape(models: Mapping[int, Weights]) -> list[list[int]]:
    stacks: dict[Any, list[int]] = {}
    for number, weights in models.items():
        stacks.setdefault((weights.config, weights.tokenizer), []).append(number)
    return list(stacks.values())


class _Stack:
    """Models of one shape and vocabulary, which write together."""

    def __init__(self, numbers: list[int], models: Sequence[Weights], request: Request) -> None:
        import torch

        from nanostudy.model.sample import generate

        self.numbers, self.tokenizer, self.config = numbers, models[0].tokenizer, models[0].config
        self.ids = self.tokenizer.encode(request.prompt or self.tokenizer.opening)
        self.params_MP = torch.cat([weights.params for weights in models])
        seeds, sampling = [request.seed] * len(models), request.sampling
        self.steps = generate(self.params_MP, self.config, self.ids, seeds, 1, request.length, sampling)
        self.decoders = [_decoder(self.tokenizer) for _ in models]

    def prompt_surprises(self) -> list[list[float | None]]:
        """Of each model, one number a token of the prompt, of as much as fits its context; None where nothing came before."""
        import torch

        from nanostudy.model.gpt import forward, named_views

        ids = self.ids[-self.config.block_size :]
        unknown: list[float | None] = [None] * (len(self.ids) - len(ids) + 1)
        if len(ids) < 2:
            return [unknown[: len(self.ids)] for _ in self.numbers]
        with torch.inference_mode():
            tokens_M1T = torch.from_numpy(ids[:-1]).expand(len(self.numbers), 1, -1)
            logits_MTV = forward(named_views(self.params_MP, self.config), tokens_M1T, self.config)[:, 0]
            surprise_MT = surprise(logits_MTV.float(), torch.from_numpy(ids[1:]).expand(len(self.numbers), -1))
        return [[*unknown, *row] for row in _rounded(surprise_MT)]

    def step(self) -> tuple[list[str], list[float]]:
        """One token of each model, as the text that it completes, and its surprise."""
        ids_MS, logits_MSV = next(self.steps)
        surprises = [row[0] for row in _rounded(surprise(logits_MSV, ids_MS))]
        return [decode(int(ids_S[0])) for decode, ids_S in zip(self.decoders, ids_MS, strict=True)], surprises


def surprise(logits_NTV: Tensor, ids_NT: Tensor) -> Tensor:
    """-ln p of each token, nats."""
    return -logits_NTV.log_softmax(-1).gather(-1, ids_NT[..., None])[..., 0]


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(value, 2) for value in row] for row in values.tolist()]


def _decoder(tokenizer: Tokenizer) -> Any:
    """From a token to the text that it completes: a character may have several bytes."""
    if tokenizer.kind == "char":
        return lambda token: tokenizer.characters[token]
    incremental = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return lambda token: incremental.decode(bytes([token]))
