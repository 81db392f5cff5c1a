"""Trains a small GPT on Shakespeare and lets it write: notebooks/train.ipynb as a script.

    python examples/train_gpu.py

Without a GPU it takes a smaller preset. Run it again after an interruption: it goes on where it was.
"""

import torch

import nanostudy

# What to change.
PRESET = "shakespeare-gpu" if torch.cuda.is_available() else "quickstart"  # `nanostudy presets` lists them
SETTINGS = {}  # changes to it, such as {"max_iters": 2000, "dropout": 0.1}
NAME = "my-gpt"  # of the run's folder; another experiment needs another name
PROMPT, TOKENS = "ROMEO:", 500


def main() -> None:
    home = nanostudy.workspace()  # Google Drive on Colab, the output on Kaggle, ./nanostudy-work elsewhere

    # The model and its training: a preset's settings, under nanoGPT's names. corpus= takes any text.
    experiment = nanostudy.preset(PRESET, **SETTINGS)
    print(f"{nanostudy.count_parameters(experiment):,} parameters")

    # Saved every minute; Ctrl-C saves, too. A finished run is only loaded.
    run = nanostudy.train(experiment, home / NAME)

    # The same figures as in the training report beside them.
    print(run.evaluations.to_string(index=False))
    run.curve().save(run.folder / "curve.html")

    for text in run.sample(PROMPT, count=2, tokens=TOKENS, temperature=0.8, top_k=200, seed=1):
        print(text, end="\n\n---\n\n")
    print(f"{run.folder / 'report.md'}, curve.html")


if __name__ == "__main__":
    main()
