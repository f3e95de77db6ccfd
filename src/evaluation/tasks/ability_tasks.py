"""lm-eval tasks made of held-out docstrings, for what a language model can do besides embedding; they need no hub.

docstring_choice: which of four summaries belongs to a text (accuracy; chance is 0.25).
docstring_text: bits per byte of texts (the log of perplexity to base 2).
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.datamodules.docstrings import Docstring, collect

_OPTIONS = 4


def ability_data(packages: Sequence[str], cache_dir: Path | str, count: int = 200, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Returns the questions and the texts of the tasks.

    Args:
        packages: see `collect`; none of them trained on.
        cache_dir: for docstrings.
        count: of questions, and of texts.
        seed: of the choice of docstrings and of wrong options.

    Raises:
        ModuleNotFoundError: a package is not installed.
        ValueError: there are fewer docstrings than `count`.
    """
    docs = collect(packages, cache_dir)
    if len(docs) < max(count, _OPTIONS):
        raise ValueError(f"{', '.join(packages)} have {len(docs)} docstrings of {count} needed: name more packages, or lower the count")
    rng = random.Random(seed)
    chosen = rng.sample(docs, count)
    return {
        "docstring_choice": [question(doc, docs, rng) for doc in chosen],
        "docstring_text": [{"text": f"{doc.summary} {doc.body}"} for doc in chosen],
    }


def question(doc: Docstring, docs: Sequence[Docstring], rng: random.Random) -> dict[str, Any]:
    """Returns the body of a docstring, four summaries (the others of its module if possible), and the index of its own."""
    others = [other for other in docs if other.summary != doc.summary]
    near = [other for other in others if other.module == doc.module]
    wrong = rng.sample(near, min(len(near), _OPTIONS - 1))
    wrong += rng.sample([other for other in others if other not in wrong], _OPTIONS - 1 - len(wrong))
    options = [doc.summary, *(other.summary for other in wrong)]
    rng.shuffle(options)
    return {"body": doc.body, "options": options, "answer": options.index(doc.summary)}


def ability_tasks(data: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns lm-eval's configuration of each task."""
    from datasets import Dataset

    def task(name: str, metric: str, aggregation: str, higher_is_better: bool, **settings: Any) -> dict[str, Any]:
        rows = {"custom_dataset": lambda **_: {"test": Dataset.from_list(data[name])}, "test_split": "test"}
        metrics = [{"metric": metric, "aggregation": aggregation, "higher_is_better": higher_is_better}]
        return {"task": name, **rows, **settings, "metric_list": metrics}

    choice = {"doc_to_text": "{{body}}\n\nIn one sentence:", "doc_to_choice": "options", "doc_to_target": "answer"}
    text = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    return [
        task("docstring_choice", "acc", "mean", True, output_type="multiple_choice", **choice),
        task("docstring_text", "bits_per_byte", "bits_per_byte", False, **text),
    ]
