"""The settings in the name of an experiment, as the published study and this project write it: b64_L4_H4_E128_BS8_MI1000_D10_s1."""

from __future__ import annotations

import re
from typing import Any

from nanostudy.analysis.table_cells import setting_value
from nanostudy.errors import UsageError
from nanostudy.settings import FIELDS, Experiment
from nanostudy.study.grid import IN_PUBLISHED_NAME, LONGEST_NAME

OTHERS = "|".join(sorted((name for name in FIELDS if name not in (*IN_PUBLISHED_NAME, "seed")), key=len, reverse=True))
NAME = re.compile(
    r"b(?P<block_size>\d+)_L(?P<n_layer>\d+)_H(?P<n_head>\d+)_E(?P<n_embd>\d+)_BS(?P<batch_size>\d+)_MI(?P<max_iters>\d+)"
    r"_D(?P<dropout>\d+(?:\.\d+)?(?:e-?\d+)?)_s(?P<seed>\d+)(?P<others>(?:_.*)?)",
    re.ASCII,
)
HASH = re.compile(r"_[0-9a-f]{8}")  # at the end of a name that would be too long, or was taken


def named_settings(name: str) -> tuple[dict[str, Any], bool]:
    """(the settings in an experiment's name, whether one at its end was lost because the name was too long).

    None in any other name. Raises UsageError where such a name says an impossible value.
    """
    cut = len(name) >= LONGEST_NAME and HASH.fullmatch(name[-9:]) is not None
    match = NAME.fullmatch(name[:-9] if cut else name)
    pieces = re.split(rf"_(?=(?:{OTHERS})[=-])", match["others"]) if match else []
    if cut:
        pieces = pieces[:-1]
    elif pieces and not pieces[-1].startswith(("corpus", "init_from")):  # these may end in anything, others in no hash
        pieces[-1] = re.sub(f"{HASH.pattern}$", "", pieces[-1])
    if not match or "".join(pieces[:1]) or not all(re.fullmatch(r"[A-Za-z0-9._=+-]+", piece) for piece in pieces[1:]):
        return {}, False
    texts = {key: match[key] for key in (*IN_PUBLISHED_NAME, "seed")}
    texts["dropout"] = str(float(texts["dropout"]) / 100)
    try:
        experiment = Experiment(**texts)  # type: ignore[arg-type]  # it reads text as the setting's type
    except UsageError:
        return {}, False
    settings = {key: getattr(experiment, key) for key in texts}
    for piece in pieces[1:]:
        key, value = re.fullmatch(rf"({OTHERS})[=-](.*)", piece).groups()  # type: ignore[union-attr]  # they were split there
        settings[key] = setting_value(key, value or "none")
    return settings, cut
