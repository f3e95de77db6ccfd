"""Triplets from a file of one's own: JSON lines with `query`, `positive`, `negative` and, if need be, `source`."""

import json
import random
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from src.datamodules.docstring_datamodule import TripletStream, batches_done
from src.datamodules.records import Triplet


def parse_triplet(line: str, where: str, negatives: int) -> Triplet:
    """One line of the file.

    Args:
        where: file and line, the record's id and the beginning of every error.
        negatives: how many to keep.

    Raises:
        ValueError: not a JSON object, a field missing, empty or of the wrong type, or too few negatives.
    """
    try:
        values: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where}: a record is a JSON object with query, positive and negative, not {type(values).__name__}")
    missing = [name for name in ("query", "positive", "negative") if name not in values]
    if missing:
        raise ValueError(f"{where}: no field {', '.join(missing)}")
    negative = values["negative"] if isinstance(values["negative"], list) else [values["negative"]]
    wrong = [name for name, text in (("query", values["query"]), ("positive", values["positive"])) if not isinstance(text, str)]
    if wrong or not all(isinstance(text, str) for text in negative):
        raise ValueError(f"{where}: {', '.join(wrong) or 'negative'} must be text")
    if len(negative) < negatives:
        raise ValueError(f"{where}: {len(negative)} negatives, datamodule.negatives={negatives} asks for more")
    return Triplet(where, values["query"], values["positive"], tuple(negative[:negatives]), str(values.get("source", "")))


def read_triplets(path: Path | str, negatives: int) -> list[Triplet]:
    """All records of a JSON-lines file (UTF-8; blank lines are skipped), each with its file and line as id.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed record, named by file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give datamodule.path a JSON-lines file of records with query, positive and negative")
    triplets = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path.name}:{number}"
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error})") from error
            if line.strip():
                triplets.append(parse_triplet(line, where, negatives))
    return triplets


class TripletsDataModule(L.LightningDataModule):
    """Triplets of a JSON-lines file, held in memory.

    Args:
        path: the file.
        batch_size: B.
        negatives: M, how many of a record's negatives are used.
        held_out: share of the records that is not trained on, chosen by `seed`; at least one record.
        seed: of the order and of what is held out.
    """

    def __init__(self, path: str, batch_size: int = 32, negatives: int = 1, held_out: float = 0.01, seed: int = 0) -> None:
        super().__init__()
        if not 0 < held_out < 1:
            raise ValueError(f"datamodule.held_out={held_out}: it is a share between 0 and 1")
        self.path, self.batch_size, self.negatives, self.held_out, self.seed = path, batch_size, negatives, held_out, seed

    def split(self) -> tuple[list[Triplet], list[Triplet]]:
        """The records to train on, and those held out."""
        triplets = read_triplets(self.path, self.negatives)
        random.Random(self.seed).shuffle(triplets)
        count = max(1, round(self.held_out * len(triplets)))
        return triplets[count:], triplets[:count]

    def prepare_data(self) -> None:
        """Reads the file once, so that a malformed record stops the run before anything is trained."""
        read_triplets(self.path, self.negatives)

    def train_dataloader(self) -> DataLoader[list[Triplet]]:
        stream = TripletStream(self.split()[0], self.batch_size, 1, self.seed, lambda: batches_done(self.trainer))
        return DataLoader(stream, batch_size=None)

    def fixed_texts(self, count: int) -> list[str]:
        """Held-out documents, the same at every call; fewer than `count` where fewer are held out."""
        return [triplet.positive for triplet in self.split()[1][:count]]
