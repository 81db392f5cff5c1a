"""Settings as fields of dataclasses, each with its meaning and what it may be; and the one check of values.

Imports nothing but the standard library: `nanostudy --help` reads this.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import re
import sys
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from nanostudy.errors import UsageError

# data: what is read. shape: decides the sizes of tensors; members of a stack share it. number: may differ
# between members. record: what is written down; it changes no weight and is no part of the identity.
# option: where and how the work is done, or how text is drawn; no part of an experiment.
Kind = Literal["data", "shape", "number", "record", "option"]
NO_CHARACTER = re.compile(r"[\x00\ud800-\udfff]")  # NUL, and halves of characters
TEXT = rf"[^{NO_CHARACTER.pattern[1:]}*"
LONGEST_VALUE = 200  # characters of a value in a message
TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}

OTHER_NAMES = {  # what people type and what their tables call it, by its letters and digits
    "learning_rate": "lr initlr learningrateinit maxlr baselr peaklr",
    "n_layer": "layers layer nlayers numlayers numlayer depth numhiddenlayers nl",
    "n_head": "heads head nheads numheads nhead numattentionheads numhead nh",
    "n_embd": "width embd dmodel embdim embeddim embeddingdim hiddensize nembed embedsize nembeddings ne modeldim",
    "block_size": "context contextlength contextlen contextsize seqlen seqlength sequencelength maxseqlen ctx ctxlen block",
    "batch_size": "batch bs trainbatchsize batchsz",
    "max_iters": "iters iterations numiters niters steps maxsteps numsteps nsteps totalsteps trainsteps maxiter maxiterations "
    "updates mi",
    "dropout": "dropoutrate dropoutprob drop dr pdrop dropoutp",
    "weight_decay": "wd",
    "warmup_iters": "warmup warmupsteps warmupiterations nwarmup",
    "gradient_accumulation_steps": "accumulation accumulationsteps gradaccum gradaccumsteps gradaccumulation gradientaccumulation",
    "grad_clip": "clip gradclipping maxgradnorm gradientclip clipnorm",
    "min_lr": "minlearningrate",
    "beta1": "adambeta1",
    "beta2": "adambeta2",
    "corpus": "text data",
}
ALIASES = {other: name for name, others in OTHER_NAMES.items() for other in others.split()}
EPOCHS = (
    "nanostudy counts updates, max_iters. One epoch is the training tokens / (batch_size * block_size * "
    "gradient_accumulation_steps) updates: 1,307 of shakespeare with the defaults."
)
EXPLAINED = {"epochs": EPOCHS, "epoch": EPOCHS, "n_epochs": EPOCHS, "num_epochs": EPOCHS}

F = TypeVar("F", bound=Callable[..., Any])


def setting(default: Any, kind: Kind, meaning: str, **rules: Any) -> Any:
    """A dataclass field that knows its kind, its meaning with its unit, and what it may be (`rules`, those of Setting)."""
    return dataclasses.field(default=default, metadata={"kind": kind, "meaning": meaning, **rules})


@dataclass(frozen=True)
class Setting:
    """One setting, as it was declared.

    `low` and `high` are included, `above` is not. A text must match the pattern, and its meaning begins with what that allows;
    or `form` makes the text of what a person gives, such as a list, and raises ValueError where it cannot.
    """

    name: str
    hint: Any  # its annotation
    default: Any
    kind: Kind
    meaning: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    pattern: str | None = None
    form: Callable[[Any], str] | None = None

    @functools.cached_property
    def base(self) -> type:
        return next(kind for kind in typing.get_args(self.hint) or (self.hint,) if kind is not type(None))

    @functools.cached_property
    def optional(self) -> bool:
        return type(None) in typing.get_args(self.hint)

    @functools.cached_property
    def range(self) -> tuple[float, float] | None:
        """The least and the greatest number, both finite; None where it is no number."""
        if self.base not in (int, float):
            return None
        most = 2**63 - 1 if self.base is int else sys.float_info.max
        low = self.low if self.above is None else math.nextafter(self.above, math.inf)
        return (-most if low is None else low), (most if self.high is None else self.high)

    @functools.cached_property
    def matches(self) -> Callable[[str], Any] | None:
        return re.compile(self.pattern or TEXT, re.DOTALL).fullmatch if self.base is str else None

    def read(self, value: Any) -> Any:
        """The value in the declared type, or UsageError. Numbers may be text; 1e3 is not how a whole number is written."""
        if self.optional and (value is None or (isinstance(value, str) and value.lower() in ("none", "null", ""))):
            return None
        try:
            typed = self._typed(value)
        except (TypeError, ValueError, OverflowError):
            also = " or none" if self.optional else ""
            kind = "" if self.form else f"{TYPES[self.base]}{also} "
            raise UsageError(f"{self.name}={_brief(value)} must be {kind}({self.meaning}).") from None
        if self.range and not self.range[0] <= typed <= self.range[1]:
            bounds = self.bounds() if self.high is not None or typed < self.range[0] else "below 2**63"
            raise UsageError(f"{self.name}={_brief(typed)} must be {bounds} ({self.meaning}).")
        if self.matches and not self.matches(typed):
            wrong = NO_CHARACTER.search(typed)
            reason = f"holds U+{ord(wrong[0]):04X}, which is no character of a text" if wrong else "is not known"
            raise UsageError(f"{self.name}={_brief(typed)} {reason}: {self.meaning}.")
        return typed

    def bounds(self) -> str:
        """Its range in words; empty where it has none."""
        if self.above is not None:
            return f"above {self.above:g}{'' if self.high is None else f' and at most {self.high:g}'}"
        if self.low is None:
            return ""
        return f"at least {self.low:g}" if self.high is None else f"from {self.low:g} to {self.high:.12g}"

    def _typed(self, value: Any) -> Any:
        """Raises TypeError, ValueError or OverflowError where it is not of the type."""
        if self.form:
            return self.form(value)
        if self.base is bool and isinstance(value, str):
            value = {"true": True, "false": False}.get(value.lower())
        elif self.base is str and isinstance(value, bool) and "yes" in (self.pattern or ""):
            value = "yes" if value else "no"  # YAML reads these words as true and false
        if isinstance(value, bool) != (self.base is bool) or (self.base is str and not isinstance(value, str)):
            raise TypeError
        if self.base in (bool, str):
            return value
        number = self.base(value) if isinstance(value, str) or self.base is float else value
        if number != int(number) and self.base is int:
            raise ValueError
        return self.base(number)


def _brief(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a number of more digits than Python writes
        return "..."
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


@functools.cache
def settings_of(kind: Any) -> dict[str, Setting]:
    """The settings that a dataclass declares, by name and in order."""
    hints = typing.get_type_hints(kind)
    return {
        field.name: Setting(field.name, hints[field.name], field.default, **field.metadata)
        for field in dataclasses.fields(kind)
        if field.metadata
    }


def check(instance: Any) -> None:
    """Checks every setting of a dataclass and puts it into its type. Raises UsageError. It must be quick: a study makes a million."""
    for name, rule in settings_of(instance.__class__).items():
        value = getattr(instance, name)
        if value is None and rule.optional:
            continue
        base = type(value)
        if base is rule.base:
            if rule.range:
                if rule.range[0] <= value <= rule.range[1]:
                    continue
            elif not rule.optional and (rule.matches is None or rule.matches(value)):
                continue
        object.__setattr__(instance, name, rule.read(value))


def canonical(name: str) -> str:
    """The setting's own name for one that people type: lr, n-layer. Files take the own names alone."""
    return ALIASES.get(letters(name), name.replace("-", "_"))


def letters(text: str) -> str:
    """The letters and digits of a name, in lower case."""
    return "".join(c for c in text.casefold() if c.isalnum())


def check_names(names: Iterable[str], allowed: Iterable[str], own: Iterable[str] = ()) -> None:
    """Raises UsageError at the first name that is not allowed, with the nearest one that is. `own`: those of experiments, which are
    given elsewhere.
    """
    allowed = list(allowed)
    for name in names:
        if name not in allowed:
            if str(name) in EXPLAINED:
                raise UsageError(f"There is no setting {name}: {EXPLAINED[name]}")
            if name in own:
                raise UsageError(f"{name} is a setting of the experiment: give it as settings={{{name!r}: ...}}.")
            if (own_name := canonical(str(name))) in allowed:
                raise UsageError(f"There is no setting {_brief(name)}: it is called {own_name}.")
            near = difflib.get_close_matches(str(name)[:LONGEST_VALUE], allowed, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else f" Known settings: {', '.join(allowed)}."
            raise UsageError(f"There is no setting {_brief(name)}.{hint}")


def usage_errors(function: F) -> F:
    """A call with missing, superfluous or misplaced arguments raises UsageError, as a wrong value does."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs).arguments
        except TypeError as problem:
            raise UsageError(
                f"{function.__name__}: {problem}. help(nanostudy.{function.__name__}) says more."
            ) from None
        for name, value in bound.items():
            if kind := _missed(signature.parameters[name], value):
                raise UsageError(f"{function.__name__}: {name} must be {kind}, not {_brief(value)}.")
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def _missed(parameter: inspect.Parameter, value: Any) -> str:
    """What the parameter takes, where this is something else; empty where it may be that. Annotations are texts here."""
    kind, several = str(parameter.annotation), parameter.kind is inspect.Parameter.VAR_POSITIONAL
    if kind in ("str", "str | None") and not isinstance(value, str) and (value is not None or kind == "str"):
        return "text"
    if kind.startswith("Sequence") and isinstance(value, str):
        return "a list"
    no_path = (bool, int, float, bytes, set, list, tuple, *(() if "Mapping" in kind else (dict,)))
    each = value if isinstance(value, (list, tuple)) and (several or kind.startswith("Sequence")) else (value,)
    return "a name or a path" if "Path" in kind and any(isinstance(one, no_path) for one in each) else ""


def takes(
    settings: Iterable[Setting], annotate: Callable[[Setting], Any] = lambda setting: setting.hint
) -> Callable[[F], F]:
    """For a function that takes these settings as **options: its signature shows each, to help() and to the commands."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        keywords = [
            inspect.Parameter(s.name, inspect.Parameter.KEYWORD_ONLY, default=s.default, annotation=annotate(s))
            for s in settings
        ]
        function.__signature__ = signature.replace(parameters=[*own, *keywords])  # type: ignore[attr-defined]
        return function

    return decorate
