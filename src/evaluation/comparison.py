"""The policies that evaluate.py compares, what their training began with, and the table of their scores."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from omegaconf import OmegaConf
from rich.table import Table

from src.evaluation.run_tasks import EvaluationScores
from src.modules.encoder.export import CHECKPOINT_SUFFIX
from src.modules.encoder.settings import SETTINGS_FILE, RationaleFor, rationale_for
from src.modules.policy.model import Policy
from src.utils.run_folder import runs_elsewhere

BASE, REASONING, TRAINED = "Base", "Base + reasoning", "Trained"

_NAMES = {
    "both": "with rationales",
    "query": "rationales of queries",
    "document": "rationales of documents",
    "none": "without rationales",
}
_CONFIG = ".hydra/config.yaml"  # Hydra's copy, in a run's folder


@dataclass(frozen=True)
class Contender:
    """A policy that is compared.

    Attributes:
        name: in the table and of its MLflow run.
        model_name: in MTEB's result files.
        path: a training checkpoint, an exported folder or a hub name.
        rationale: the texts that it is encoded with rationales of (see EncoderSettings); None: as its settings say.
    """

    name: str
    model_name: str
    path: str
    rationale: RationaleFor | None

    def settled(self, trained_with: RationaleFor) -> "Contender":
        """Returns the same with `rationale` as in its settings, if it was None; the name then tells of another than `both`."""
        if self.rationale is not None:
            return self
        name = self.name if trained_with == "both" else f"{self.name}, {_NAMES[trained_with]}"
        return replace(self, name=name, rationale=trained_with)


def contenders(
    model: str | None, rationale: RationaleFor | bool | None, base: str, output_root: Path | str, name: str | None = None
) -> list[Contender]:
    """Returns the policy of `model`; without it the base without and with rationales, and the latest export.

    Args:
        rationale: of `model` or the latest export; see Contender.
        name: of `model` in MTEB's result files; None: made of its path.

    Raises:
        ValueError: an unknown `rationale`.
    """
    asked = None if rationale is None else rationale_for(rationale)
    if model is not None:
        suffix = "" if asked is None else f", {_NAMES[asked]}"
        return [Contender(f"{Path(model).name}{suffix}", name or model_name(model), model, asked)]
    rows = [Contender(row, model_name(base), base, rationale_for(row == REASONING)) for row in (BASE, REASONING)]
    trained = latest_export(output_root)
    return rows + ([Contender(TRAINED, model_name(str(trained)), str(trained), asked)] if trained else [])


def latest_export(output_root: Path | str) -> Path | None:
    """Returns the newest exported policy of any run, wherever it lies; None if there is none. See `exports`."""
    return next(iter(exports(output_root)), None)


def exports(output_root: Path | str) -> list[Path]:
    """Returns all exported policies, newest first: at any depth below `output_root`, and of the runs elsewhere that it lists."""
    places = (Path(output_root), *runs_elsewhere(Path(output_root)))
    found = {file.with_name("config.json") for place in places for file in place.glob(f"**/{SETTINGS_FILE}")}
    whole = [file for file in found if file.is_file()]
    return [file.parent for file in sorted(whole, key=lambda file: (file.stat().st_mtime, str(file)), reverse=True)]


def how_it_was_found(export: Path, output_root: Path | str) -> str:
    """Returns one line on the newest export: where it is, when it was written, and that another can be named."""
    others = len(exports(output_root)) - 1
    when = datetime.fromtimestamp((export / "config.json").stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    return (
        f"{export}, of {when}: the newest of {others + 1} exports; model= names another"
        if others
        else f"{export}, of {when}: the only export"
    )


def model_name(path: str) -> str:
    """Returns `organisation/name` for MTEB's result files: a hub name as it is, a local path by its end.

    `outputs/tiny_sup/2026-11-21_10-00-00/export` is `grace/tiny_sup_2026-11-21_10-00-00`.
    """
    if path.count("/") == 1 and not path.startswith((".", "~", "/")) and not Path(path).exists():
        return path
    if path.startswith("package:"):
        return "grace/" + path.removeprefix("package:")
    parts = [part for part in Path(path).absolute().parts[1:] if part not in ("export", "checkpoints", "weights")]
    return "grace/" + re.sub(r"[^\w.-]+", "-", "_".join(parts[-2:])).removesuffix(".ckpt")


def starting_policy(path: str, policy: Policy) -> str:
    """Returns the folder or hub name of the policy that a training began with.

    Args:
        path: a training checkpoint, an exported folder, or a hub name.
        policy: the policy that was loaded from there.

    Raises:
        ValueError: it is not known.
    """
    start = policy.path if Path(path).suffix == CHECKPOINT_SUFFIX else start_of_export(Path(path))
    if not start:
        raise ValueError(f"abilities.tasks compares {path} with the start of its training, which is not known here: name it by base=")
    return start


def start_of_export(export: Path) -> str | None:
    """Returns policy.path of the run that wrote an export; None if there is no such run, or its policy came from no path."""
    file = export.absolute().parent / _CONFIG
    path = OmegaConf.select(OmegaConf.load(file), "policy.path") if export.is_dir() and file.is_file() else None
    return None if path is None else str(path)


def comparison_table(rows: Mapping[str, EvaluationScores], title: str) -> Table:
    """Returns the main scores in percent: a row a task, then one a category unless each has one task; a column a policy."""
    table = Table(title=title)
    table.add_column("task")
    for name in rows:
        table.add_column(name, justify="right")
    tasks = list(dict.fromkeys(name for scores in rows.values() for name in (*scores.tasks, *scores.failures)))
    categories = list(dict.fromkeys(name for scores in rows.values() for name in scores.categories))
    for names, kind in ((tasks, "tasks"), (categories if len(categories) < len(tasks) else [], "categories")):
        for name in names:
            table.add_row(name, *(_percent(getattr(scores, kind).get(name)) for scores in rows.values()))
        if names:
            table.add_section()
    table.add_row("average", *(_average(scores, len(tasks)) for scores in rows.values()), style="bold")
    return table


def _percent(score: float | None) -> str:
    return "failed" if score is None else f"{100 * score:.2f}"


def _average(scores: EvaluationScores, tasks: int) -> str:
    """Returns the average in percent, with the number of tasks if some failed, as it then compares with no other."""
    if not scores.tasks:
        return "failed"
    return _percent(scores.average) + (f" ({len(scores.tasks)} of {tasks} tasks)" if len(scores.tasks) < tasks else "")
