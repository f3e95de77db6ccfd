"""The rationale encoder as MTEB sees it. Importing this imports mteb, which takes seconds: import it where it is used."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction

from src.modules.encoder import RationaleEncoder

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import BatchedInput, PromptType
    from torch.utils.data import DataLoader


def revision(encoder: RationaleEncoder) -> str:
    """A name for what the encoder computes: it changes with any weight and with every setting that moves an embedding.

    MTEB keeps results by model name and revision, so two encoders that differ must not share one.
    """
    policy, engine = encoder.policy, encoder.engine
    digest = hashlib.sha256()
    for name, tensor in sorted(policy.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    settings: dict[str, Any] = encoder.settings.to_dict() | {"rationale": encoder.rationale}
    settings |= {"chat_template": policy.tokenizer.chat_template, "vocabulary": policy.tokenizer.get_vocab()}
    device = policy.device.type
    settings["arithmetic"] = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "as loaded"
    if encoder.rationale:
        settings |= {"temperature": encoder.temperature, "seed": encoder.seed, "batch_size": encoder.batch_size}
        settings |= {f"engine.{key}": value for key, value in vars(engine).items() if isinstance(value, int | float | str | bool)}
        settings["engine"] = type(engine).__qualname__
    digest.update(json.dumps(settings, sort_keys=True).encode())
    mode = "prompt" if not encoder.rationale else "greedy" if encoder.temperature == 0 else "sampled"
    return f"{digest.hexdigest()[:16]}-{mode}"


def describe(encoder: RationaleEncoder, name: str) -> ModelMeta:
    """What MTEB records about the model, all of it true of this one."""
    model = encoder.policy.model
    return ModelMeta.create_empty(
        overwrites={
            "name": name if "/" in name else f"grace/{name}",
            "revision": revision(encoder),
            "n_parameters": sum(p.numel() for p in model.parameters()),
            "n_embedding_parameters": sum(p.numel() for p in model.get_input_embeddings().parameters()),
            "embed_dim": encoder.dimension,
            "max_tokens": encoder.settings.max_prompt_tokens,
            "similarity_fn_name": ScoringFunction.COSINE,
            "framework": ["PyTorch", "Transformers"],
            "use_instructions": False,  # one instruction for all tasks
            "modalities": ["text"],
        }
    )


class MTEBEncoder(AbsEncoder):
    """Embeds MTEB's batches, each text once: tasks that share texts share their embeddings, and their rationales.

    Documents are read with their title, which MTEB puts before the text.

    Args:
        encoder: does the work. Its weights must not change while this object lives: make a new one for every evaluation.
        name: for MTEB's result files.
        remembered_texts: most embeddings kept (4 D bytes each).
    """

    def __init__(self, encoder: RationaleEncoder, name: str, remembered_texts: int = 50_000) -> None:
        self.model = encoder
        self.mteb_model_meta = describe(encoder, name)
        self.remembered_texts = remembered_texts
        self._known: dict[str, np.ndarray] = {}

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
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        fresh = dict(zip(new, self.model.encode(new), strict=True))
        rows = [fresh[text] if text in fresh else self._known[text] for text in texts]
        room = self.remembered_texts - len(self._known)
        self._known.update((text, fresh[text]) for text in new[: max(0, room)])
        return np.stack(rows) if rows else np.zeros((0, self.model.dimension), dtype=np.float32)
