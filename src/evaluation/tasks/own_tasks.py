"""Tasks of one's own: a small YAML beside jsonl or tsv files describes an MTEB task, and MTEB's own evaluators score it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from src.datamodules.files import inside
from src.evaluation.tasks.own_data import DATASETS
from src.evaluation.tasks.own_rows import content_digest

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask


@dataclass(frozen=True)
class Kind:
    """A type of task.

    Attributes:
        base: MTEB's class, by name.
        files: what names its files in a description.
        main_score: MTEB's usual one.
        attributes: of the class, that depart from MTEB's: a set of one's own is small, and embedded whole.
    """

    base: str
    files: tuple[str, ...]
    main_score: str
    attributes: Mapping[str, Any]


KINDS = {
    "STS": Kind("AbsTaskSTS", ("data",), "cosine_spearman", {}),
    "PairClassification": Kind("AbsTaskPairClassification", ("data",), "max_ap", {}),
    "Retrieval": Kind("AbsTaskRetrieval", ("corpus", "queries", "qrels"), "ndcg_at_10", {}),
    "Reranking": Kind("AbsTaskRetrieval", ("data",), "map_at_1000", {}),
    "Classification": Kind("AbsTaskClassification", ("train", "data"), "accuracy", {}),
    "Clustering": Kind("AbsTaskClustering", ("data",), "v_measure", {"max_fraction_of_documents_to_embed": None}),
}


@dataclass(frozen=True)
class Description:
    """What a YAML file says.

    Attributes:
        name: of the task and of its result file; letters, digits, `-`, `_` and `.`.
        type: STS, PairClassification, Retrieval, Reranking, Classification or Clustering.
        data, train, corpus, queries, qrels: files beside it, those that its type asks for.
        columns: see src/evaluation/tasks/own_rows.py.
        description: one line on what is asked.
        language: ISO 639-3 and script.
        main_score: any of the scores of MTEB's evaluator; None: its usual one.
    """

    name: str
    type: str
    data: str | None = None
    train: str | None = None
    corpus: str | None = None
    queries: str | None = None
    qrels: str | None = None
    columns: Any = None
    description: str = "A task of one's own."
    language: str = "eng-Latn"
    main_score: str | None = None


def find_own_tasks(data_dir: Path | str) -> dict[str, Path]:
    """YAML files by the name of the task that each describes: those of the folder and of the folders in it, sorted.

    Raises:
        ValueError: a malformed one, or two of one name.
    """
    found: dict[str, Path] = {}
    for file in sorted(path for pattern in ("*.y*ml", "*/*.y*ml") for path in Path(data_dir).glob(pattern)):
        name = read_description(file).name
        if name in found:
            raise ValueError(f"{file} and {found[name]} both describe a task named {name}: rename one")
        found[name] = file
    return found


def read_description(file: Path) -> Description:
    """What the file says.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no YAML, or lacks a setting, or has one that is not known.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no description of a task at {file}")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} describes no task: it needs name, type and files")
    problem = _problem(values)
    if problem:
        raise ValueError(f"{file}: {problem}")
    return Description(**values)


def _problem(values: Mapping[Any, Any]) -> str | None:
    """What is wrong with a description, if anything is."""
    known = [field.name for field in fields(Description)]
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        return f"{', '.join(unknown)} is not known; there are {', '.join(known)}"
    kind = KINDS.get(str(values.get("type")))
    if kind is None:
        return f"type {values.get('type')!r} is none of {', '.join(KINDS)}"
    missing = [key for key in ("name", *kind.files) if not isinstance(values.get(key), str)]
    if missing:
        return f"a task of type {values['type']} needs {', '.join(missing)}"
    if not values["name"].replace("-", "").replace("_", "").replace(".", "").isalnum():
        return f"name {values['name']!r} has other characters than letters, digits, '-', '_' and '.'"
    columns = values.get("columns")
    names = list(columns.values()) if isinstance(columns, dict) else columns
    if columns is not None and not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        return "columns is a list of names, or a mapping of fields to names"
    return None


def own_task(file: Path) -> "AbsTask":
    """The task that a YAML file describes. Its data is read and checked now, and again whenever MTEB asks for it.

    Raises:
        FileNotFoundError: the file, or one that it names, is not there.
        ValueError: a malformed description, or data that is, by file and line.
    """
    import mteb.abstasks

    file = file.absolute()
    told = read_description(file)
    kind = KINDS[told.type]
    files = _files(file, told, kind)

    def dataset() -> Any:
        return DATASETS[told.type](files, told.columns)

    size = _check(file, dataset)
    attributes = {**kind.attributes, **({"max_documents_per_cluster": min(size, 16_384)} if told.type == "Clustering" else {})}
    revision = content_digest(list(files.values()), repr(sorted(asdict(told).items())))
    members = {"metadata": _metadata(told, kind, file.parent, revision), "load_data": _loader(dataset), **attributes}
    made: AbsTask = type(told.name, (getattr(mteb.abstasks, kind.base),), members)()
    return made


def _files(file: Path, told: Description, kind: Kind) -> dict[str, Path]:
    try:
        return {role: inside(file.parent, getattr(told, role)) for role in kind.files}
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _check(file: Path, dataset: Callable[[], Any]) -> int:
    """Reads the data once; rows of its test split."""
    try:
        test = dataset()
        return len(test["test"]) if "test" in test else 0
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{file}: {error}") from error


def _loader(dataset: Callable[[], Any]) -> Callable[..., None]:
    def load_data(self: "AbsTask", num_proc: int | None = None, **kwargs: Any) -> None:
        if not self.data_loaded:
            self.dataset, self.data_loaded = dataset(), True

    return load_data


def _metadata(told: Description, kind: Kind, folder: Path, revision: str) -> Any:
    from mteb.abstasks.task_metadata import TaskMetadata

    return TaskMetadata(
        name=told.name,
        description=told.description,
        dataset={"path": str(folder), "revision": revision},
        type=told.type,  # type: ignore[arg-type]
        category="t2c" if told.type in ("Classification", "Clustering") else "t2t",
        eval_splits=["test"],
        eval_langs=[told.language],
        main_score=told.main_score or kind.main_score,
    )
