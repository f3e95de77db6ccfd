"""Shows the first records of a config's data as they are read and as they are rendered; for `python train.py ... dry_run=true`."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from src.datamodules.rows import BadRecord
from src.modules.policy.loading import find_model, load_tokenizer
from src.modules.prompt.renderer import PromptRenderer
from src.records import Triplet

SHOWN, _LONGEST = 3, 400  # records, and characters of a text


def show_records(cfg: DictConfig) -> None:
    """Prints the lines of `preview`."""
    Console(width=150, highlight=False, markup=False).print("\n".join(["", *preview(cfg)]), soft_wrap=True)


def preview(cfg: DictConfig) -> list[str]:
    """Returns lines: some records, and the positive of the first as a prompt. Nothing is prepared or kept.

    What is out of reach is said in a line: a plan needs neither data nor tokenizer.
    """
    try:
        if OmegaConf.is_missing(cfg.datamodule, "path"):
            raise FileNotFoundError("datamodule.path has no value")
        datamodule = instantiate(cfg.datamodule)
        if not hasattr(datamodule, "preview"):
            return [f"records      not shown: {type(datamodule).__name__} has no method preview(count)"]
        records = datamodule.preview(SHOWN)
    except (FileNotFoundError, ValueError) as error:
        return [f"records      not shown: {error}"]
    read_as = getattr(datamodule, "read_as", "")
    lines = [f"records      the first {len(records)}" + (f"; {read_as}" if read_as else "")]
    for record in records:
        lines += _lines(record)
    triplets = [record for record in records if isinstance(record, Triplet)]
    return lines + (_prompt(cfg, triplets[0].positive) if triplets else [])


def _lines(record: Triplet | BadRecord) -> list[str]:
    if isinstance(record, BadRecord):
        return [f"  {record.where}: malformed: {record.reason}"]
    texts = [("query", record.query), ("positive", record.positive), *(("negative", text) for text in record.negatives)]
    shown = [("text", record.positive)] if record.query == record.positive and not record.negatives else texts
    return [f"  {record.id} (source {record.source})", *(f"    {name:9s} {_cut(text)!r}" for name, text in shown)]


def _prompt(cfg: DictConfig, text: str) -> list[str]:
    """Returns a text as the policy reads it."""
    policy: Any = cfg.policy
    try:
        find_model(policy.path, policy.revision)
        tokenizer = load_tokenizer(policy.path, policy.revision, policy.trust_remote_code)
        ids = PromptRenderer(tokenizer, cfg.module.instruction, cfg.module.max_prompt_tokens, cfg.module.template_kwargs)([text]).ids[0]
    except (OSError, ValueError) as error:
        return [f"prompt       not shown: {error}"]
    shown = str(tokenizer.decode(ids.tolist(), skip_special_tokens=False))
    return [f"prompt       the first positive, {len(ids)} tokens", *(f"  | {line}" for line in shown.split("\n"))]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
