"""A user's own tasks: a YAML file beside files of data describes a task for MTEB's evaluators."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from src.datamodules.files import inside
from src.evaluation.tasks import own_data
from src.evaluation.tasks.made_tasks import Set, make_task

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask


class Kind(NamedTuple):
    """A task type: the function that reads its data, the files that a description names for it, and MTEB's usual main score."""

    read: Callable[..., Set]
    files: tuple[str, ...]
    main_score: str


KINDS = {
    "STS": Kind(own_data.sts, ("data",), "cosine_spearman"),
    "PairClassification": Kind(own_data.pair_classification, ("data",), "max_ap"),
    "Retrieval": Kind(own_data.retrieval, ("corpus", "queries", "qrels"), "ndcg_at_10"),
    "Reranking": Kind(own_data.reranking, ("data",), "map_at_1000"),
    "Classification": Kind(own_data.classification, ("train", "data"), "accuracy"),
    "Clustering": Kind(own_data.clustering, ("data",), "v_measure"),
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
        return self


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
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{file}: {error}") from error
    members: dict[str, Any] = {}
    if task.type == "Clustering":  # small, so all of it is embedded
        members = {"max_fraction_of_documents_to_embed": None, "max_documents_per_cluster": min(len(data["test"]), 16_384)}
    revision = content_digest(list(files.values()), repr(sorted(task.model_dump().items())))
    metadata = {"description": task.description, "main_score": task.main_score or kind.main_score, "language": task.language}
    return make_task(task.name, task.type, make_set, members, dataset={"path": str(file.parent), "revision": revision}, **metadata)


def content_digest(files: Sequence[Path], settings: str) -> str:
    """Returns 16 hexadecimal digits that depend on the files' content and the settings."""
    digest = hashlib.sha256(settings.encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
