"""lm-eval tasks made of held-out docstrings, for what a language model can do besides embedding; they need no hub."""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from src.datamodules.docstrings import Docstring, collect
from src.utils.atomic import make_folder_once

OFFLINE_TASKS = ("docstring_choice", "docstring_text")
"""Which of four summaries belongs to a text (accuracy; chance is 0.25), and bits per byte of texts (the log of perplexity to base 2)."""

_OPTIONS = 4


def ability_folder(packages: Sequence[str], cache_dir: Path | str, count: int = 200, seed: int = 0) -> Path:
    """Returns a folder with both tasks as lm-eval's YAML files and with their data; makes it if it does not exist.

    Args:
        packages: see `collect`; none of them trained on.
        cache_dir: for docstrings and the folder.
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
    data = {
        "docstring_choice": [question(doc, docs, rng) for doc in chosen],
        "docstring_text": [{"text": f"{doc.summary} {doc.body}"} for doc in chosen],
    }
    folder = Path(cache_dir).absolute() / f"abilities_{hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]}"

    def write(partial: Path) -> None:
        for name, config in task_configs(folder).items():
            (partial / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data[name]), encoding="utf-8")
            (partial / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")

    return make_folder_once(folder, write)


def question(doc: Docstring, docs: Sequence[Docstring], rng: random.Random) -> dict[str, Any]:
    """Returns the body of a docstring, four summaries (the others of its module if possible), and the index of its own."""
    others = [other for other in docs if other.summary != doc.summary]
    near = [other for other in others if other.module == doc.module]
    wrong = rng.sample(near, min(len(near), _OPTIONS - 1))
    wrong += rng.sample([other for other in others if other not in wrong], _OPTIONS - 1 - len(wrong))
    options = [doc.summary, *(other.summary for other in wrong)]
    rng.shuffle(options)
    return {"body": doc.body, "options": options, "answer": options.index(doc.summary)}


def task_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns lm-eval's configuration of each task, with the data in `folder`."""

    def task(name: str, metric: str, aggregation: str, higher_is_better: bool, **settings: Any) -> dict[str, Any]:
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}, "test_split": "test"}
        metrics = [{"metric": metric, "aggregation": aggregation, "higher_is_better": higher_is_better}]
        return {"task": name, **data, **settings, "metric_list": metrics}

    choice = {"doc_to_text": "{{body}}\n\nIn one sentence:", "doc_to_choice": "options", "doc_to_target": "answer"}
    text = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    return {
        "docstring_choice": task("docstring_choice", "acc", "mean", True, output_type="multiple_choice", **choice),
        "docstring_text": task("docstring_text", "bits_per_byte", "bits_per_byte", False, **text),
    }
