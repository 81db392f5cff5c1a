"""A study whose names, reasons and samples try to run as script."""

from dataclasses import replace

import pandas as pd
from synthetic import synthetic

from nanostudy.analysis.frames import Results

FACTORS = {"n_embd": [128, 256], "n_head": [4, 8], "dropout": [0.1, 0.2]}
EFFECTS = {"n_embd": -0.2, "dropout": 0.05, "n_embd x dropout": -0.03}
HOSTILE = "</script><script>window.stolen = 1</script><img src=x onerror='window.stolen = 2'> & `code` \u2028"


def hostile() -> Results:
    results = synthetic(FACTORS, EFFECTS, seeds=(1, 2), noise=0.01, diverged=[3], waiting=[4], curves=True)
    table = results.experiments.copy()
    table.loc[table["status"] == "diverged", "reason"] = HOSTILE
    first = table.index[0]
    table = table.rename(index={first: f"{first} {HOSTILE}"})
    rename = {first: f"{first} {HOSTILE}"}
    curves = results.evaluations.assign(name=results.evaluations["name"].replace(rename))
    finished = table.index[table["status"] == "finished"]
    texts = [(name, "ROMEO:", f"ROMEO:\n{HOSTILE} said {name}") for name in finished]
    samples = pd.DataFrame(texts, columns=["name", "prompt", "text"])
    return replace(results, title=f"study {HOSTILE}", experiments=table, evaluations=curves, samples=samples)
