"""What experiments are trained from: their corpora, first weights, identities and jobs. One training and a study prepare them here."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nanostudy.data.corpus import Corpus, load_corpus
from nanostudy.errors import UsageError
from nanostudy.settings import Experiment
from nanostudy.training.train import Job
from nanostudy.training.weights import Weights, fitted, load_weights


def corpus_key(experiment: Experiment) -> tuple[str | None, ...]:
    """What decides the tokens that an experiment reads."""
    return experiment.corpus, experiment.tokenizer, experiment.split, experiment.init_from


@dataclass
class Inputs:
    """Each corpus and each file of first weights is read once, when it is first needed."""

    corpora: dict[Hashable, Corpus] = field(default_factory=dict)  # by corpus_key
    weights: dict[str, Weights] = field(default_factory=dict)  # by init_from

    @staticmethod
    def of(experiment: Experiment) -> Inputs:
        """With its first weights read, and no corpus yet: the part that one rank reads for all. Raises NanostudyError."""
        inputs = Inputs()
        inputs.first_weights(experiment)
        return inputs

    def first_weights(self, experiment: Experiment) -> Weights | None:
        """The weights that init_from names. Raises NanostudyError."""
        if experiment.init_from is None:
            return None
        if experiment.init_from not in self.weights:
            self.weights[experiment.init_from] = load_weights(Path(experiment.init_from))
        return self.weights[experiment.init_from]

    def corpus(self, experiment: Experiment) -> Corpus:
        """Raises UsageError where it cannot be read, or is too short for the model."""
        key = corpus_key(experiment)
        if key not in self.corpora:
            first = self.first_weights(experiment)
            tokenizer = first.tokenizer if first else experiment.tokenizer
            self.corpora[key] = load_corpus(experiment.corpus, tokenizer, experiment.split)
        self.corpora[key].check_window(experiment.block_size)
        return self.corpora[key]

    def check_prompts(self, setting: str, prompts: Sequence[str | None]) -> None:
        """Raises UsageError, before any training, where a corpus that was read lacks a character of these prompts."""
        for corpus in self.corpora.values():
            for prompt in prompts:
                try:
                    corpus.tokenizer.encode(prompt or "")
                except UsageError as problem:
                    raise UsageError(f"{setting}: {problem}") from None

    def identity(self, experiment: Experiment) -> str:
        corpus, first = self.corpus(experiment), self.first_weights(experiment)
        return experiment.identity(corpus.sha256, corpus.tokenizer.kind, first.sha256 if first else None)

    def job(self, name: str, experiment: Experiment, begun: bool = False) -> Job:
        """`begun`: it has a checkpoint, so that weights of a training begun elsewhere need not serve as first ones."""
        first = self.first_weights(experiment)
        resumes = begun and first is not None and first.goes_on is not None
        initial = fitted(first, experiment) if first and not resumes else None
        return Job(name, experiment, self.identity(experiment), initial)
