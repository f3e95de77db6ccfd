"""A user's own tasks: a YAML file beside files of data describes a task for MTEB's evaluators."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from src.datamodules.files import inside
from src.evaluation.tasks import own_data
from src.evaluation.tasks.made_tasks import Set, make_task

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask


def _names(pattern: str, *parts: Sequence[object]) -> tuple[str, ...]:
    return tuple(pattern.format(*chosen) for chosen in product(*parts))


_CUTOFFS = (1, 3, 5, 10, 20, 100, 1000)
_SEARCH = (*_names("{}_at_{}", ("ndcg", "map", "recall", "precision", "mrr", "hit_rate"), _CUTOFFS), "accuracy")
_CORRELATIONS = ("pearson", "spearman")
_OF_LABELS = ("accuracy", "f1", "f1_weighted", "precision", "precision_weighted", "recall", "recall_weighted")
_OF_TWO_LABELS = ("ap", "ap_weighted")


class Kind(NamedTuple):
    """A task type: the function that reads its data, the files that a description names for it, and the scores of MTEB's evaluator.

    The first score is the usual main one.
    """

    read: Callable[..., Set]
    files: tuple[str, ...]
    scores: tuple[str, ...]


KINDS = {
    "STS": Kind(
        own_data.sts,
        ("data",),
        ("cosine_spearman", "cosine_pearson", *_CORRELATIONS, *_names("{}_{}", ("manhattan", "euclidean"), _CORRELATIONS)),
    ),
    "PairClassification": Kind(
        own_data.pair_classification,
        ("data",),
        _names(
            "{}_{}",
            ("max", "similarity", "cosine", "manhattan", "euclidean", "dot"),
            ("ap", "accuracy", "f1", "precision", "recall"),
        ),
    ),
    "Retrieval": Kind(own_data.retrieval, ("corpus", "queries", "qrels"), ("ndcg_at_10", *_SEARCH)),
    "Reranking": Kind(own_data.reranking, ("data",), ("map_at_1000", *_SEARCH)),
    "Classification": Kind(own_data.classification, ("train", "data"), (*_OF_LABELS, *_OF_TWO_LABELS)),
    "Clustering": Kind(own_data.clustering, ("data",), ("v_measure", "ami")),
}


class Description(BaseModel, extra="forbid"):
    """The content of a task's YAML file.

    Attributes:
        name: of the task and of its result file; letters, digits, `-`, `_` and `.`.
        type: a name in KINDS.
        data, train, corpus, queries, qrels: files beside the YAML file; the type decides which are needed.
        columns: see `own_data.read_rows`.
        description: one line.
        language: ISO 639-3 and script.
        main_score: one of the scores of MTEB's evaluator; None for its usual one.
    """

    name: Annotated[str, Field(pattern=r"^[\w.-]*[^\W_][\w.-]*$")]
    type: str
    data: str | None = None
    train: str | None = None
    corpus: str | None = None
    queries: str | None = None
    qrels: str | None = None
    columns: Annotated[list[str], Field(min_length=1)] | Annotated[dict[str, str], Field(min_length=1)] | None = None
    description: str = "A task of one's own."
    language: str = "eng-Latn"
    main_score: str | None = None

    @model_validator(mode="after")
    def _files_of_type(self) -> "Description":
        if self.type not in KINDS:
            raise ValueError(f"type {self.type!r} is none of {', '.join(KINDS)}")
        missing = [role for role in KINDS[self.type].files if getattr(self, role) is None]
        if missing:
            raise ValueError(f"a task of type {self.type} needs {', '.join(missing)}")
        require_score(self.main_score, KINDS[self.type].scores)
        return self


def require_score(name: str | None, scores: Sequence[str]) -> None:
    """Raises ValueError if a main score is named that is none of `scores`."""
    if name is not None and name not in scores:
        raise ValueError(f"main_score {name!r} is none of {', '.join(dict.fromkeys(scores))}")


def find_own_tasks(data_dir: Path | str) -> dict[str, Path]:
    """Returns the YAML files of a folder and the folders in it, by the name of the task that each describes.

    Raises:
        ValueError: a file is malformed, or two describe tasks of one name.
    """
    found: dict[str, Path] = {}
    for file in sorted(path for pattern in ("*.y*ml", "*/*.y*ml") for path in Path(data_dir).glob(pattern)):
        name = read_description(file).name
        if name in found:
            raise ValueError(f"{file} and {found[name]} both describe a task named {name}: rename one")
        found[name] = file
    return found


def read_description(file: Path) -> Description:
    """Returns what a YAML file says.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is malformed.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no description of a task at {file}")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} describes no task: it needs name, type and files")
    try:
        return Description.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{file}: {own_data.problems(error)}; settings are {', '.join(Description.model_fields)}") from error


def own_task(file: Path) -> "AbsTask":
    """Returns the task that a YAML file describes. Its data is read and checked now, and read again when MTEB loads it.

    Raises:
        FileNotFoundError: the file, or one that it names, is absent.
        ValueError: the description is malformed, or the data, by file and line.
    """
    file = file.absolute()
    task = read_description(file)
    kind = KINDS[task.type]

    try:
        files = {role: inside(file.parent, getattr(task, role)) for role in kind.files}
        make_set = partial(kind.read, task.columns, **files)
        data = make_set()
        if task.type == "Classification" and len({row["label"] for row in data["train"]}) > 2:
            require_score(task.main_score, _OF_LABELS)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{file}: {error}") from error
    members: dict[str, Any] = {}
    if task.type == "Clustering":  # small, so all of it is embedded
        members = {"max_fraction_of_documents_to_embed": None, "max_documents_per_cluster": min(len(data["test"]), 16_384)}
    revision = content_digest(list(files.values()), repr(sorted(task.model_dump().items())))
    metadata = {"description": task.description, "main_score": task.main_score or kind.scores[0], "language": task.language}
    return make_task(task.name, task.type, make_set, members, dataset={"path": str(file.parent), "revision": revision}, **metadata)


def content_digest(files: Sequence[Path], settings: str) -> str:
    """Returns 16 hexadecimal digits that depend on the files' content and the settings."""
    digest = hashlib.sha256(settings.encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
