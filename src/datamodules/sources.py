"""Looks for the model and the data of a config before a run starts, and says of both at once what is out of reach."""

import logging

from omegaconf import DictConfig, ListConfig, OmegaConf

from src.datamodules.files import find_files
from src.modules.policy.loading import find_model

log = logging.getLogger(__name__)

_DEFAULT_DATA = {
    "hf://datasets/sentence-transformers/all-nli/triplet": (
        "data: the triplets of sentence-transformers/all-nli, from the hub; the paper trains on the Echo-embeddings collection: "
        "datamodule.path=<its folder>, or any triplets of your own"
    ),
    "hf://datasets/princeton-nlp/datasets-for-simcse/wiki1m_for_simcse.txt": (
        "data: wiki1m_for_simcse.txt of princeton-nlp/datasets-for-simcse, from the hub, as in the paper; your own: datamodule.path=<file>"
    ),
}
"""What is said of the data that experiments have without a path of the user's."""


def require_sources(cfg: DictConfig) -> None:
    """Finds model and data, from the hub if they are there, and logs a line about default data.

    Raises:
        FileNotFoundError: one or both are out of reach, or have no path; a line for each.
    """
    missing = [line for find in (_find_model, _find_data) if (line := find(cfg))]
    if missing:
        raise FileNotFoundError("\n".join(missing))


def _find_model(cfg: DictConfig) -> str | None:
    """Returns what is wrong, or None."""
    if OmegaConf.is_missing(cfg.policy, "path"):
        return "policy.path has no value: give policy.path=<a folder with a model and its tokenizer, or a hub name>"
    try:
        if path := cfg.policy.get("path"):  # a policy of the user's own may have none
            find_model(path, cfg.policy.get("revision"))
    except FileNotFoundError as error:
        return str(error)
    return None


def _find_data(cfg: DictConfig) -> str | None:
    """Returns what is wrong, or None."""
    data = cfg.datamodule
    if OmegaConf.is_missing(data, "path"):
        return "datamodule.path has no value: give datamodule.path=<a file, a folder, or a data set on the hub>"
    path = data.get("path")
    if not isinstance(path, str | ListConfig) or "files" not in data:  # docstrings need no file
        return None
    try:
        find_files(path if isinstance(path, str) else list(path), data.files, data.get("revision"))
    except FileNotFoundError as error:
        return str(error)
    if isinstance(path, str) and path in _DEFAULT_DATA:
        log.info(_DEFAULT_DATA[path])
    return None
