"""Model cards: the README.md of an export, with the front matter that the hub and sentence-transformers read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from src.modules.encoder.settings import EncoderSettings, RationaleFor
from src.modules.policy.packaged import SMOLLM2, SMOLLM2_HUB_NAME, SMOLLM2_LICENSE

CARD_FILE = "README.md"

_TAGS = ["sentence-transformers", "sentence-similarity", "feature-extraction", "dense", "grace"]


@dataclass(frozen=True)
class TrainingFacts:
    """Facts of a training that a run knows, for the card; empty where it is not known.

    Attributes:
        method: its name in tables.
        data: the training data in words.
        datasets: its names on the hub.
        settings: what was set, by name: the reward, K, ...
        scores: main scores of the exported encoder by the run's own evaluations, as fractions.
        table: the same and those of the starting policy: row -> column -> fraction.
        example: a held-out text and its rationale.
    """

    method: str = "GRACE"
    data: str = ""
    datasets: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    scores: Sequence[EvalResult] = ()
    table: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    example: tuple[str, str] | None = None


def write_card(folder: Path, base: str, dimension: int, settings: EncoderSettings, facts: TrainingFacts) -> None:
    """Writes the card of an export into its folder; `base` is the path of the policy that training began with."""
    (folder / CARD_FILE).write_text(card(base, dimension, settings, facts), encoding="utf-8")


def card(base: str, dimension: int, settings: EncoderSettings, facts: TrainingFacts) -> str:
    """Returns the card as Markdown with front matter. Of a local path no more than its last name is told."""
    hub_name, base_license = hub_name_of(base), license_of(base)
    name = f"{(hub_name or base).rstrip('/').split('/')[-1]}-{facts.method}"
    front = ModelCardData(
        base_model=hub_name,
        license=base_license,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=_TAGS,
        datasets=list(facts.datasets) or None,
        model_name=name if facts.scores else None,
        eval_results=list(facts.scores) or None,
    )
    writes = settings.rationale != "none"
    rows = {
        "base model": f"[{hub_name}](https://huggingface.co/{hub_name})" if hub_name else f"`{Path(base).name}`, a local model",
        "licence of the base": base_license or "unknown: ask where it comes from before you pass this model on",
        "training data": facts.data or "unknown",
        "instruction (system message)": _code(settings.instruction or "none"),
        "instruction for queries": _code(settings.query_instruction) if settings.query_instruction is not None else "the same",
        "embedding": f"{dimension} numbers: {settings.pooling} of the states of layer {settings.layer} over "
        + ("text and rationale" if writes else "the text, without a rationale"),
        "rationales are written for": {"both": "queries and documents", "none": "no text"}.get(
            settings.rationale, f"{settings.rationale} texts"
        ),
        "longest prompt and rationale": f"{settings.max_prompt_tokens} and {settings.max_new_tokens} tokens",
        "compare by": "cosine",
        "method": facts.method,
        **facts.settings,
    }
    how = "writes a rationale about a text and embeds both" if writes else "embeds texts"
    parts = [f"# {name}", f"A language model that {how}.", _table(rows), _loading(settings.rationale)]
    if facts.table:
        parts += ["## Scores", "Main scores on held-out tasks, by the training run itself, in %.", _scores(facts.table)]
    if facts.example is not None:
        parts += ["## Example", "A held-out text:", fenced(facts.example[0]), "Its rationale:", fenced(facts.example[1])]
    return f"---\n{front.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def hub_name_of(path: str) -> str | None:
    """Returns the name on the hub of a model that was loaded by `path`; None of a folder."""
    if path == SMOLLM2:
        return SMOLLM2_HUB_NAME
    return path if path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists() else None


def license_of(path: str) -> str | None:
    """Returns the licence that the card of a model names: of a folder, or as the hub's cache has it. None if it is not known."""
    if path == SMOLLM2:
        return SMOLLM2_LICENSE
    file = Path(path, CARD_FILE)
    if not file.is_file():
        try:
            cached = try_to_load_from_cache(path, CARD_FILE)
        except HFValidationError:  # no name on the hub
            return None
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    try:
        found = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("license")
    except (ValueError, yaml.YAMLError):  # bytes that are no text, or front matter that is no YAML
        return None
    return found if isinstance(found, str) else None


def fenced(text: str) -> str:
    """Returns a Markdown code block whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text.strip()}\n{fence}"


def _code(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', '/')}`"


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _scores(table: Mapping[str, Mapping[str, float]]) -> str:
    columns = list(next(iter(table.values())))
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    return "\n".join(
        [*lines, *(f"| {row} | " + " | ".join(f"{100 * scores[c]:.2f}" for c in columns) + " |" for row, scores in table.items())]
    )


def _loading(rationale: RationaleFor) -> str:
    """Returns the section on loading; the folder of the card is what `path` names."""
    encode = "encode(texts)" if rationale == "none" else "encode(texts, rationale=True)"
    if rationale in ("query", "document"):
        encode = "encode_query(queries)  # and encode_document(documents): rationales are written about one side"
    side = f', prompt_type="{rationale}"' if rationale in ("query", "document") else ""
    return f"""## Loading it

`path` is this repository's name, or a folder with its files.

With sentence-transformers. One Python module in the repository runs; read `rationale_transformer.py` first:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(path, trust_remote_code=True)
vectors = model.{encode}
```

With the project that trained it:

```python
from src.modules.encoder.encoder import RationaleEncoder

encoder = RationaleEncoder.from_pretrained(path)
vectors, rationales = encoder.explain(texts{side})
```

With transformers, as the language model that writes the rationales:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
```"""
