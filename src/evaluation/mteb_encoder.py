"""The rationale encoder as MTEB sees it. Importing this imports mteb, which takes seconds: import it where it is used."""

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction

from src.evaluation.embedding_cache import EmbeddingCache
from src.evaluation.fingerprint import mode, revision
from src.modules.encoder.encoder import RationaleEncoder
from src.utils.timing import clock

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import BatchedInput, PromptType
    from torch.utils.data import DataLoader

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0
"""How often a long call says how far it is."""

_BATCHES_AT_A_TIME = 4  # written about between two looks at the clock and two writes to the cache


def describe(encoder: RationaleEncoder, name: str) -> ModelMeta:
    """What MTEB records about the model, all of it true of this one.

    Settings of the rationale stand as `experiment_kwargs`, which is how MTEB tells variants of one model apart, in its
    folders and in its tables.

    Args:
        name: `organisation/model`, or a name that is put under `grace/`.
    """
    model = encoder.policy.model
    written: dict[str, Any] = {"rationale": mode(encoder)}
    if encoder.rationale:
        written["max_new_tokens"] = encoder.engine.max_new_tokens
    if mode(encoder) == "sampled":
        written |= {"temperature": encoder.temperature, "seed": encoder.seed}
    return ModelMeta.create_empty(
        overwrites={
            "name": name if "/" in name else f"grace/{name}",
            "revision": revision(encoder),
            "n_parameters": sum(p.numel() for p in model.parameters()),
            "n_embedding_parameters": sum(p.numel() for p in model.get_input_embeddings().parameters()),
            "memory_usage_mb": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20,
            "embed_dim": encoder.dimension,
            "max_tokens": encoder.settings.max_prompt_tokens,
            "similarity_fn_name": ScoringFunction.COSINE,
            "framework": ["PyTorch", "Transformers"],
            "use_instructions": encoder.settings.query_instruction is not None,  # otherwise one for all texts
            "modalities": ["text"],
            "experiment_kwargs": written,
        }
    )


class MTEBEncoder(AbsEncoder):
    """Embeds MTEB's batches, each text once: tasks that share texts share their embeddings, and their rationales.

    Documents are read with their title, which MTEB puts before the text; queries under the encoder's instruction for
    queries, where it has one. A long call is done in pieces, the longest texts first, each of which is kept when it is
    done: what a killed run had embedded is there for the next.

    Args:
        encoder: does the work. Its weights must not change while this object lives: make a new one for every evaluation.
        name: for MTEB's result files.
        embeddings_dir: where embeddings are kept for later; None: in memory, for the time of this object.
        embeddings_gib: most that they may take.
        also_without: keeps there the embeddings without rationales too, which an encoder with rationales meets on its way: the same
            policy's encoder without them, asked next, finds them.
    """

    def __init__(
        self,
        encoder: RationaleEncoder,
        name: str,
        embeddings_dir: Path | None = None,
        embeddings_gib: float = 1.0,
        also_without: bool = False,
    ) -> None:
        self.model = encoder
        device = encoder.policy.device.type
        # texts are embedded in the arithmetic of now; what MTEB computes of embeddings is not (see run_tasks)
        self.arithmetic: dict[str, Any] = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        self.mteb_model_meta: ModelMeta = describe(encoder, name)
        self.cache = EmbeddingCache(embeddings_dir, str(self.mteb_model_meta.revision), encoder.dimension, embeddings_gib)
        self.plain_cache: EmbeddingCache | None = None
        if also_without and encoder.rationale and embeddings_dir:
            plain = RationaleEncoder(encoder.policy, encoder.settings, encoder.engine, rationale=False)
            self.plain_cache = EmbeddingCache(embeddings_dir, revision(plain), encoder.dimension, embeddings_gib)

    def __enter__(self) -> "MTEBEncoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.cache.close()
        if self.plain_cache is not None:
            self.plain_cache.close()

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
        """[N, D] float32 embeddings of all texts of the loader, in its order."""
        texts = [text for batch in inputs for text in batch["text"]]
        if not texts:
            return np.zeros((0, self.model.dimension), dtype=np.float32)
        side = prompt_type.value if prompt_type else None
        prompt = self.model.settings.instruction_for(side)
        embeddings = self.cache.get(texts, prompt)
        new = sorted({text for text in texts if text not in embeddings}, key=lambda text: (-len(text), text))
        for part in self._with_time_left(new, f"{task_metadata.name}, {side or hf_split}" if task_metadata else hf_split):
            with torch.autocast(**self.arithmetic):
                if self.plain_cache is None:
                    vectors, plain = self.model.encode(part, prompt_type=side), None
                else:
                    vectors, plain = self.model.encode_both(part, prompt_type=side)
            if self.plain_cache is not None and plain is not None:
                self.plain_cache.put(part, plain, prompt)
            self.cache.put(part, vectors, prompt)
            embeddings.update(zip(part, vectors, strict=True))
        return np.stack([embeddings[text] for text in texts])

    def _with_time_left(self, texts: Sequence[str], what: str) -> Iterator[Sequence[str]]:
        """Parts of the texts; now and then a line in the log says how much is done, measured in characters."""
        total, done = sum(len(text) + 1 for text in texts), 0
        began = last_line = time.monotonic()
        size = self.model.batch_size * _BATCHES_AT_A_TIME
        for start in range(0, len(texts), size):
            part = texts[start : start + size]
            yield part
            done += sum(len(text) + 1 for text in part)
            now = time.monotonic()
            if now - last_line >= SECONDS_BETWEEN_LINES and done < total:
                last_line = now
                left = clock((now - began) / done * (total - done))
                log.info("%s: %d of %d texts embedded, about %s left", what, start + len(part), len(texts), left)
