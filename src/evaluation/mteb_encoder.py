"""The rationale encoder as an MTEB model. Importing this imports mteb, which takes seconds: import it where it is used."""

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import Licenses

from src.evaluation.embedding_cache import EmbeddingCache
from src.evaluation.fingerprint import mode, revision, weights_digest
from src.evaluation.shared import embed
from src.modules.distributed.ranks import ALONE, Ranks
from src.modules.encoder.card import license_of
from src.modules.encoder.encoder import RationaleEncoder
from src.modules.encoder.settings import RationaleFor
from src.utils.timing import clock

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import BatchedInput, PromptType
    from torch.utils.data import DataLoader

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0
"""Time between two log lines of a long call."""

_CALLS_AT_A_TIME = 4  # of the engine, between two writes to the cache


class MTEBEncoder(AbsEncoder):
    """Embeds MTEB's batches, each text once: tasks that share texts share their embeddings and rationales.

    Documents are read with their title, which MTEB puts before the text; queries under the encoder's query instruction, if it has one.
    The longest texts are embedded first, in parts that are cached one by one, so that a run that is killed loses one part.

    Args:
        encoder: embeds. Its weights must not change while this object lives.
        name: for MTEB's result files.
        embeddings_dir: where embeddings are kept; None: in memory, as long as this object.
        embeddings_gib: most that they may take.
        also_without: also keeps the embeddings without rationales, which an encoder with rationales computes on the way, for the same
            policy's encoder without.
        ranks: those that embed; the others `serve`.

    Attributes:
        caches: of embeddings with rationales and without; an encoder that writes for one side shares both with those that write for both
            sides and for none.
    """

    def __init__(
        self,
        encoder: RationaleEncoder,
        name: str,
        embeddings_dir: Path | None = None,
        embeddings_gib: float = 1.0,
        also_without: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.ranks = encoder, ranks
        weights = weights_digest(encoder.policy)
        self.mteb_model_meta: ModelMeta = describe(encoder, name, weights)
        kept: dict[bool, RationaleFor] = {True: "both", False: "none"}
        if encoder.rationale in ("both", "none") and not (also_without and encoder.rationale == "both" and embeddings_dir):
            del kept[encoder.rationale == "none"]
        self.caches = {
            writes: EmbeddingCache(embeddings_dir, revision(encoder, rationale, weights), encoder.dimension, embeddings_gib)
            for writes, rationale in kept.items()
        }

    def __enter__(self) -> "MTEBEncoder":
        return self

    def __exit__(self, *_: object) -> None:
        for cache in self.caches.values():
            cache.close()

    def encode(
        self,
        inputs: "DataLoader[BatchedInput]",
        *,
        task_metadata: "TaskMetadata",
        hf_split: str,
        hf_subset: str,
        prompt_type: "PromptType | None" = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Returns [N, D] float32 embeddings of all texts of the loader, in its order."""
        texts = [text for batch in inputs for text in batch["text"]]
        if not texts:
            return np.zeros((0, self.model.dimension), dtype=np.float32)
        role = prompt_type.value if prompt_type else None
        prompt = self.model.settings.instruction_for(role)
        writes = self.model.writes(role)
        cache, plain_cache = self.caches[writes], self.caches.get(False) if writes else None
        embeddings = cache.get(texts, prompt)
        new = sorted({text for text in texts if text not in embeddings}, key=lambda text: (-len(text), text))
        for part in self._parts(new, f"{task_metadata.name}, {role or hf_split}" if task_metadata else hf_split):
            vectors, plain = embed(self.model, part, role, plain_cache is not None, self.ranks)
            if plain_cache is not None and plain is not None:
                plain_cache.put(part, plain, prompt)
            cache.put(part, vectors, prompt)
            embeddings.update(zip(part, vectors, strict=True))
        return np.stack([embeddings[text] for text in texts])

    def _parts(self, texts: Sequence[str], what: str) -> Iterator[Sequence[str]]:
        """Yields parts of the texts, and logs the progress and the time left, measured in characters."""
        total, done = sum(len(text) + 1 for text in texts), 0
        began = last_line = time.monotonic()
        size = self.model.texts_at_a_time * self.ranks.count * _CALLS_AT_A_TIME
        for start in range(0, len(texts), size):
            part = texts[start : start + size]
            yield part
            done += sum(len(text) + 1 for text in part)
            now = time.monotonic()
            if now - last_line >= SECONDS_BETWEEN_LINES and done < total:
                last_line, left = now, clock((now - began) / done * (total - done))
                log.info("%s: %d of %d texts embedded, about %s left", what, start + len(part), len(texts), left)


def describe(encoder: RationaleEncoder, name: str, weights: str | None = None) -> ModelMeta:
    """Returns what MTEB records about the model.

    Settings of the rationale are `experiment_kwargs`, by which MTEB tells variants of one model apart in folders and tables.

    Args:
        name: `organisation/model`, or a name that is put under `grace/`.
        weights: their digest, where it is known.
    """
    model, rationale = encoder.policy.model, mode(encoder, encoder.rationale)
    variant: dict[str, Any] = {"rationale": rationale}
    variant |= {} if rationale == "none" else {"max_new_tokens": encoder.engine.max_new_tokens}
    variant |= {"temperature": encoder.temperature, "seed": encoder.seed} if rationale.startswith("sampled") else {}
    return ModelMeta.create_empty(
        overwrites={
            "name": name if "/" in name else f"grace/{name}",
            "revision": revision(encoder, weights=weights),
            "n_parameters": sum(p.numel() for p in model.parameters()),
            "n_embedding_parameters": sum(p.numel() for p in model.get_input_embeddings().parameters()),
            "memory_usage_mb": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20,
            "embed_dim": encoder.dimension,
            "max_tokens": encoder.settings.max_prompt_tokens,
            "license": found if (found := license_of(encoder.policy.path)) in get_args(Licenses) else None,
            "similarity_fn_name": ScoringFunction.COSINE,
            "framework": ["PyTorch", "Transformers"],
            "use_instructions": encoder.settings.query_instruction is not None,  # otherwise one for all texts
            "modalities": ["text"],
            "experiment_kwargs": variant,
        }
    )
