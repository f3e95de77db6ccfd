"""What a language model can do besides embedding, asked without a hub: lm-eval tasks made of held-out docstrings."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from src.datamodules.docstrings import Docstring, collect

OFFLINE_TASKS = ("docstring_choice", "docstring_text")
"""Which of four summaries belongs to a text (accuracy; 0.25 is chance), and bits per byte of texts (2 to them: perplexity)."""

_OPTIONS = 4


def ability_folder(packages: Sequence[str], cache_dir: Path | str, count: int = 200, seed: int = 0) -> Path:
    """A folder with both tasks in lm-eval's own YAML and their data beside it, written once.

    Args:
        packages: names as in `collect`, none of them trained on.
        cache_dir: where docstrings and the folder are kept.
        count: questions, and texts.
        seed: of the choice of docstrings and of the wrong options.

    Raises:
        ModuleNotFoundError: a package is not installed.
        ValueError: fewer docstrings than `count`.
    """
    docs = collect(packages, cache_dir)
    if len(docs) < max(count, _OPTIONS):
        raise ValueError(
            f"{', '.join(packages)} have {len(docs)} docstrings, and {count} are asked for: name more packages, or lower the count"
        )
    rng = random.Random(seed)
    chosen = rng.sample(docs, count)
    data = {
        "docstring_choice": [question(doc, docs, rng) for doc in chosen],
        "docstring_text": [{"text": f"{doc.summary} {doc.body}"} for doc in chosen],
    }
    folder = Path(cache_dir).absolute() / f"abilities_{hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]}"
    if not folder.exists():
        _write(folder, data)
    return folder


def question(doc: Docstring, docs: Sequence[Docstring], rng: random.Random) -> dict[str, Any]:
    """The body of a docstring, its summary among those of others (of its module, as far as there are any), and which it is."""
    others = [other for other in docs if other.summary != doc.summary]
    near = [other for other in others if other.module == doc.module]
    wrong = rng.sample(near, min(len(near), _OPTIONS - 1))
    wrong += rng.sample([other for other in others if other not in wrong], _OPTIONS - 1 - len(wrong))
    options = [doc.summary, *(other.summary for other in wrong)]
    rng.shuffle(options)
    return {"body": doc.body, "options": options, "answer": options.index(doc.summary)}


def task_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """The two tasks as lm-eval has them in YAML, with the data in `folder`."""

    def task(name: str, metric: str, higher_is_better: bool, **asked: Any) -> dict[str, Any]:
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}, "test_split": "test"}
        aggregation = "mean" if metric == "acc" else metric
        return {
            "task": name,
            **data,
            **asked,
            "metric_list": [{"metric": metric, "aggregation": aggregation, "higher_is_better": higher_is_better}],
        }

    choice = {"doc_to_text": "{{body}}\n\nIn one sentence:", "doc_to_choice": "options", "doc_to_target": "answer"}
    return {
        "docstring_choice": task("docstring_choice", "acc", True, output_type="multiple_choice", **choice),
        "docstring_text": task(
            "docstring_text", "bits_per_byte", False, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="text"
        ),
    }


def _write(folder: Path, data: dict[str, list[dict[str, Any]]]) -> None:
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")  # written aside: two runs may start at once
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, config in task_configs(folder).items():
        (partial / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data[name]), encoding="utf-8")
        (partial / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(partial)  # another run was first, with the same content
