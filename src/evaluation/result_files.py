"""MTEB's result cache, safe against a kill during a write. Importing this imports mteb."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mteb import ResultCache

if TYPE_CHECKING:
    from mteb.models.model_meta import ModelMeta
    from mteb.results import TaskResult

_SETTINGS = "run_settings.jsonl"  # in a model's folder; MTEB adds lines to it


class AtomicResults(ResultCache):
    """A result cache that writes files elsewhere and renames them.

    Does not keep a result without a score, which MTEB makes of an aggregate with failed parts and would later take for done.
    """

    def save_to_cache(
        self,
        task_result: "TaskResult",
        model_name: "str | ModelMeta",
        model_revision: str | None = None,
        *,
        encode_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if any(entry["main_score"] is None for entries in task_result.scores.values() for entry in entries):
            return
        target = self.get_task_result_path(task_result.task_name, model_name, model_revision)
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.cache_path, prefix=".writing-") as folder:
            partial = ResultCache(folder)
            written = partial.get_task_result_path(task_result.task_name, model_name, model_revision)
            written.parent.mkdir(parents=True)
            if Path(target.parent, _SETTINGS).exists():
                shutil.copy(target.parent / _SETTINGS, written.parent)
            partial.save_to_cache(task_result, model_name, model_revision, encode_kwargs=encode_kwargs)
            for file in sorted(written.parent.iterdir(), key=lambda file: file.name == written.name):  # the score last
                os.replace(file, target.parent / file.name)
