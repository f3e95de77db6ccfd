"""How a text becomes an embedding: the settings that travel with a policy's weights."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from src.modules.policy.pooling import POOLINGS, PoolingName
from src.modules.prompt.renderer import GRACE_INSTRUCTION

SETTINGS_FILE = "grace.json"
"""Its name in an exported folder, beside config.json."""


def check_pooling(pooling: str, layer: int, where: str) -> None:
    """Refuses a pooling or a layer that does not exist; `where` is what named them.

    Raises:
        ValueError: neither mean nor eos nor max; neither the last layer nor the one before.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"{where}: pooling={pooling!r} does not exist; it is {', '.join(POOLINGS)}")
    if layer not in (-1, -2):
        raise ValueError(f"{where}: layer={layer}; it is -1 (the last) or -2 (the one before)")


@dataclass(frozen=True)
class EncoderSettings:
    """Prompt, lengths and pooling of an encoder. The defaults are the paper's (GRACE, arXiv 2510.04506).

    Attributes:
        instruction: the system message.
        max_prompt_tokens: longest prompt, the chat's frame included.
        max_new_tokens: longest rationale, EOS included.
        pooling: what makes one vector of many states: `mean`, `eos` or `max`.
        layer: whose states: -1, the last layer's, or -2, those of the one before.
        template_kwargs: passed to the chat template.
        query_instruction: the system message for queries, where they are told apart from documents; None: the same.
        rationale: whether its embeddings were trained with rationales, and so are to be made with them.

    Raises:
        ValueError: a length below one, or a pooling or a layer that does not exist.
    """

    instruction: str = GRACE_INSTRUCTION
    max_prompt_tokens: int = 1024
    max_new_tokens: int = 256
    pooling: PoolingName = "mean"
    layer: int = -1
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    query_instruction: str | None = None
    rationale: bool = True

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"encoder settings: {name}={getattr(self, name)}, it must be at least 1")
        check_pooling(self.pooling, self.layer, "encoder settings")

    def instruction_for(self, prompt_type: str | None) -> str:
        """The system message for a text of this side: `query`, `document`, or None where there are no sides.

        Raises:
            ValueError: another side.
        """
        if prompt_type not in ("query", "document", None):
            raise ValueError(f"prompt_type={prompt_type!r}: it is query, document or none")
        return self.query_instruction if prompt_type == "query" and self.query_instruction is not None else self.instruction

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in the file and in checkpoints (which are read as weights only)."""
        return asdict(self) | {"template_kwargs": dict(self.template_kwargs)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> "EncoderSettings":
        """Settings from plain values; `where` names their origin in errors.

        Raises:
            ValueError: a key that is not a setting.
        """
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
        """The settings of a folder or of a model on the hub; the paper's where it has none (any instruct model).

        Raises:
            ValueError: the file is no JSON object, or has unknown keys.
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
