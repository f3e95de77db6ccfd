"""Where to reason: scores and texts a second with rationales of queries and documents, of one of them, and of neither.

python -m experiments.where_to_reason.study [models] [--limit 60] [--output experiments/where_to_reason/results.md]

Models are exports, checkpoints or names; SmolLM2-135M-Instruct, untrained, without one. Tasks are the docstring test tasks, of which
retrieval and reranking have queries and documents. Each text is read once for all four values.
"""

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from omegaconf import OmegaConf

from experiments.speed.measuring import machine, report, table
from experiments.speed.subject import ROOT
from src.datamodules.docstrings import collect
from src.evaluation.run_tasks import run_tasks
from src.evaluation.tasks.offline_tasks import SIZES, OfflineSize, offline_tasks
from src.modules.encoder.encoder import RationaleEncoder
from src.modules.encoder.export import load_policy
from src.modules.encoder.settings import EncoderSettings, RationaleFor
from src.modules.policy.model import Policy
from src.modules.policy.packaged import SMOLLM2
from src.modules.rollouts.hf import HFEngine

SHORT = {"instruction": "Explain in a few words what this text is about.", "max_prompt_tokens": 96, "max_new_tokens": 16}
"""Of a model without settings of its own: those of experiment=smollm2_sup on a CPU."""

COLUMNS = ("rationales of", "DocstringRetrieval", "DocstringReranking", "average of 5", "queries/s", "documents/s")


def speeds(encoder: RationaleEncoder, queries: Sequence[str], documents: Sequence[str]) -> tuple[float, float]:
    """Texts a second of both sides; nothing is read from a cache."""
    found = []
    for prompt_type, texts in (("query", queries), ("document", documents)):
        began = time.perf_counter()
        encoder.encode(texts, prompt_type)
        found.append(len(set(texts)) / (time.perf_counter() - began))
    return found[0], found[1]


def rows_of(policy: Policy, settings: EncoderSettings, tasks: list[Any], timed: tuple[Sequence[str], Sequence[str]]) -> list[list[str]]:
    """A row for each value of `rationale`."""

    def encoder(rationale: RationaleFor) -> RationaleEncoder:
        return RationaleEncoder(policy, settings, HFEngine(settings.max_new_tokens), rationale)

    # two measurements of each side serve all four values
    by_value = {value: speeds(encoder(value), *timed) for value in ("both", "none")}
    rows = []
    with TemporaryDirectory() as kept:  # embeddings with and without rationales come from one pass, that of `both`
        for value in get_args(RationaleFor):
            scores = run_tasks(encoder(value), tasks, None, f"where-{value}", Path(kept), also_without=True)
            if scores.failures:
                raise SystemExit("where_to_reason: " + "; ".join(f"{task}: {reason}" for task, reason in scores.failures.items()))
            numbers = [scores.tasks["DocstringRetrieval"], scores.tasks["DocstringReranking"], scores.average]
            query, document = (by_value["both" if value in ("both", side) else "none"][i] for i, side in enumerate(("query", "document")))
            rows.append([value, *(f"{100 * number:.1f}" for number in numbers), f"{query:.1f}", f"{document:.1f}"])
    return rows


def size_of(limit: int | None) -> OfflineSize:
    """The size of the tasks, with at most `limit` documents and a third as many queries."""
    size = SIZES["mini"]
    return size if limit is None else replace(size, documents=limit, queries=max(24, limit // 3), candidates=6, per_label=4)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[SMOLLM2])
    parser.add_argument("--limit", type=int, help="documents of the tasks, in place of 200")
    parser.add_argument("--timed", type=int, default=64, help="texts of each side that are timed")
    parser.add_argument("--output", type=Path)
    a = parser.parse_args(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    packages, cache = list(OmegaConf.load(ROOT / "configs" / "packages" / "docstrings.yaml")["test"]), ROOT / "data" / "cache"
    tasks = offline_tasks(packages, cache, size_of(a.limit))
    docs = collect(packages, cache)[: a.timed]
    timed = [doc.summary for doc in docs], [doc.body for doc in docs]
    sections = []
    for model in a.models:
        policy, settings = load_policy(model)
        settings = settings if settings != EncoderSettings() else replace(settings, **SHORT)
        policy.to("cuda" if torch.cuda.is_available() else "cpu")
        sections.append(f"## {model}\n\n{table(COLUMNS, rows_of(policy, settings, tasks, timed))}")
    size = size_of(a.limit)
    head = f"{machine()}. {size.documents} documents, {size.queries} queries; speeds of {a.timed} texts of each side. Scores in %.\n\n"
    report(head + "\n".join(sections), a.output)


if __name__ == "__main__":
    main()
