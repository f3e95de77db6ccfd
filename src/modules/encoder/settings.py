"""The settings that make an embedding of a text; an export keeps them beside the policy's weights."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from transformers.utils.hub import cached_file

from src.modules.policy.pooling import PoolingName, check_pooling
from src.modules.prompt.renderer import GRACE_INSTRUCTION

RationaleFor = Literal["both", "query", "document", "none"]
"""The texts that rationales are written about."""

SETTINGS_FILE = "grace.json"
"""The file's name in an exported folder."""


@dataclass(frozen=True)
class EncoderSettings:
    """Prompt, lengths and pooling of an encoder. The defaults are the paper's (GRACE, arXiv 2510.04506).

    Attributes:
        instruction: the system message; empty for none.
        max_prompt_tokens: longest prompt, the chat's frame included.
        max_new_tokens: longest rationale, EOS included.
        pooling: `mean`, `eos` or `max` of the states.
        layer: whose states: -1, the last layer's, or -2, those of the one before.
        template_kwargs: passed to the chat template.
        query_instruction: the system message for queries; None: the same as for documents.
        rationale: the texts that are embedded with rationales: `both` queries and documents, one of them, or `none`; True is both, and
            False none.

    Raises:
        ValueError: a length below one, or a pooling, a layer or a value of `rationale` that does not exist.
    """

    instruction: str | None = GRACE_INSTRUCTION
    max_prompt_tokens: int = 1024
    max_new_tokens: int = 256
    pooling: PoolingName = "mean"
    layer: int = -1
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    query_instruction: str | None = None
    rationale: RationaleFor = "both"

    def __post_init__(self) -> None:
        if self.instruction is None:  # as YAML says it
            object.__setattr__(self, "instruction", "")
        for name in ("max_prompt_tokens", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"encoder settings: {name}={getattr(self, name)}, it must be at least 1")
        check_pooling(self.pooling, self.layer, "encoder settings")
        object.__setattr__(self, "rationale", rationale_for(self.rationale))

    def instruction_for(self, prompt_type: str | None) -> str:
        """Returns the system message for a `query`, a `document`, or (None) any text; raises ValueError for another type."""
        if prompt_type not in ("query", "document", None):
            raise ValueError(f"prompt_type={prompt_type!r}: it is query, document or none")
        return self.query_instruction if prompt_type == "query" and self.query_instruction is not None else self.instruction or ""

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for the file and for checkpoints (which are read as weights only)."""
        return asdict(self) | {"template_kwargs": dict(self.template_kwargs)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> "EncoderSettings":
        """Reads plain values; raises ValueError, naming their origin `where`, for an unknown key."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"{where} has settings that are not known here: {', '.join(unknown)}; was it written by a newer version?")
        return cls(**values)

    def save(self, folder: Path | str) -> None:
        """Writes `grace.json` into a folder that exists."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        Path(folder, SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str) -> "EncoderSettings":
        """Reads the settings of a folder or of a model on the hub; without a file (any instruct model) they are the paper's.

        Raises ValueError if the file is no JSON object, or has unknown keys.
        """
        file = cached_file(str(folder), SETTINGS_FILE, _raise_exceptions_for_missing_entries=False)
        if file is None:
            return cls()
        try:
            values = json.loads(Path(file).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{file} is not a JSON object of settings")
        return cls.from_dict(values, str(file))


def rationale_for(value: RationaleFor | bool) -> RationaleFor:
    """Returns the value of `rationale`, in which True is `both` and False `none`; raises ValueError for another one."""
    if isinstance(value, bool):
        return "both" if value else "none"
    if value not in get_args(RationaleFor):
        raise ValueError(f"rationale={value!r}: it is both, query, document or none")
    return value
