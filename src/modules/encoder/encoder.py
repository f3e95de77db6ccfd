"""Texts to embeddings: the policy writes a rationale about each text, and both are pooled."""

import hashlib
from collections.abc import Iterable, Mapping, Set
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from src.modules.encoder.export import load_policy
from src.modules.encoder.settings import EncoderSettings, RationaleFor, rationale_for
from src.modules.policy.batching import embed_all
from src.modules.policy.model import Policy, evaluation_mode
from src.modules.prompt.renderer import PromptRenderer, require_room
from src.modules.rollouts.engine import RolloutEngine
from src.modules.rollouts.hf import HFEngine
from src.modules.types import without_rationales

WRITTEN_AT_A_TIME = {"cpu": 64, "cuda": 1024}
"""Texts whose rationales an engine is asked for at once; it makes batches of them by its own budget."""


class RationaleEncoder:
    """Embeds texts with a policy, with its rationales or without: `RationaleEncoder.from_pretrained(folder).encode(texts)`.

    A text's embedding does not depend on the other texts, but for rounding.

    Args:
        policy: the model; a call does not change its modes.
        settings: prompt and pooling.
        engine: writes the rationales and limits their length. Unused without rationales.
        rationale: the texts that rationales are written about; of others the prompt alone is pooled (`none` is the paper's Base). A text
            whose `prompt_type` is not said has none under `query` and `document`: texts of one kind are compared with each other, so
            they are embedded alike, and in the cheaper way.
        temperature: of the rationales; 0 is greedy.
        seed: of sampled rationales. A text draws from this seed and its content, so it gets the same rationale among any
            other texts, and after a restart.
        batch_tokens: most tokens of a pass over texts, or over texts and their rationales.
        bf16: whether arithmetic is in bfloat16 (autocast), whatever is in force around the call; None: on a GPU.

    Raises:
        ValueError: a negative temperature, a budget below one, an unknown `rationale`, another pooling than the policy's, lengths that its
            context does not hold, or a tokenizer without a chat template.
    """

    def __init__(
        self,
        policy: Policy,
        settings: EncoderSettings,
        engine: RolloutEngine,
        rationale: RationaleFor | bool = True,
        temperature: float = 0.0,
        seed: int = 0,
        batch_tokens: int = 2**15,
        bf16: bool | None = None,
    ) -> None:
        if temperature < 0:
            raise ValueError(f"temperature={temperature}: it is 0 (greedy) or above")
        if (settings.pooling, settings.layer) != (policy.pooling, policy.layer):
            raise ValueError(
                f"the encoder's settings say pooling={settings.pooling}, layer={settings.layer}, and the policy pools by "
                f"{policy.pooling} at layer {policy.layer}: make both the same"
            )
        self.policy, self.settings, self.engine, self.rationale = policy, settings, engine, rationale_for(rationale)
        require_room(policy.context, settings.max_prompt_tokens, 0 if self.rationale == "none" else engine.max_new_tokens)
        self.temperature, self.seed, self.batch_tokens, self._bf16 = temperature, seed, _positive(batch_tokens), bf16
        self.renderers = {
            kind: PromptRenderer(
                policy.tokenizer, settings.instruction_for(kind), settings.max_prompt_tokens, dict(settings.template_kwargs)
            )
            for kind in ("query", "document", None)
        }

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        device: str | torch.device | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        batch_tokens: int = 2**15,
        bf16: bool | None = None,
        trust_remote_code: bool = False,
    ) -> "RationaleEncoder":
        """Loads the encoder of an exported folder, of a training checkpoint (*.ckpt), or of an instruct model on the hub.

        Rationales are written where the model's settings say: nowhere, if it was trained without.

        Args:
            path: of the folder or checkpoint, or the model's name.
            device: None takes a GPU if there is one.
            max_new_tokens: longest rationale; None: the setting of the training.
            temperature, seed, batch_tokens, bf16: see RationaleEncoder.
            trust_remote_code: lets Python files that come with a model run; an export needs none.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: a checkpoint that GRACE did not write, or a setting out of range.
        """
        policy, settings = load_policy(path, trust_remote_code)
        if max_new_tokens is not None:
            settings = replace(settings, max_new_tokens=max_new_tokens)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        engine = HFEngine(settings.max_new_tokens)
        return cls(policy.to(device), settings, engine, settings.rationale, temperature, seed, batch_tokens, bf16)

    @property
    def dimension(self) -> int:
        """D, the size of an embedding."""
        return int(self.policy.model.config.get_text_config().hidden_size)

    @property
    def bf16(self) -> bool:
        """Returns whether arithmetic is in bfloat16."""
        return self.policy.device.type == "cuda" if self._bf16 is None else self._bf16

    @property
    def texts_at_a_time(self) -> int:
        """Texts whose rationales are asked for at once."""
        return WRITTEN_AT_A_TIME.get(self.policy.device.type, WRITTEN_AT_A_TIME["cpu"])

    def writes(self, prompt_type: str | None) -> bool:
        """Returns whether texts of this type are embedded with rationales."""
        return self.rationale in ("both", prompt_type)

    def encode(
        self,
        texts: Iterable[str],
        prompt_type: str | None = None,
        rationale: RationaleFor | bool | None = None,
        batch_tokens: int | None = None,
        show_progress: bool = False,
    ) -> np.ndarray:
        """Embeds texts, in their order.

        Args:
            texts: any iterable of strings (a list, a generator, a pandas Series, a numpy array); a repeated text is embedded once.
            prompt_type: `query` or `document`. Both have the same prompt, as GRACE was trained, unless the settings have a
                `query_instruction`.
            rationale: whether rationales are written; None: as the encoder's setting says for this type.
            batch_tokens: see RationaleEncoder; None: the encoder's setting.
            show_progress: shows a bar of texts done and time left, on standard error.

        Returns:
            [N, D] float32, pooled and not normalised; compare them by cosine.

        Raises:
            TypeError: one string in place of several, or something that is no string; its place and type are named.
            ValueError: an embedding that is not finite, an unknown prompt type, a budget below one.
        """
        return self._run(texts, prompt_type, rationale, batch_tokens, show_progress)[0]

    def encode_both(
        self, texts: Iterable[str], prompt_type: str | None = None, batch_tokens: int | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns embeddings with rationales and without, [N, D] float32 each, from one pass; see `encode`.

        The second are those of `encode(rationale=False)`, but for rounding; None from an engine that gives none.
        """
        with_rationales, _, plain = self._run(texts, prompt_type, True, batch_tokens, False)
        return with_rationales, plain

    def explain(
        self,
        texts: Iterable[str],
        prompt_type: str | None = None,
        rationale: RationaleFor | bool | None = None,
        batch_tokens: int | None = None,
        show_progress: bool = False,
    ) -> tuple[np.ndarray, list[str]]:
        """Returns embeddings, see `encode`, and the rationale of each text ("" without rationales).

        Rationales keep tags such as <think>, even if they are special tokens.
        """
        embeddings, rationales, _ = self._run(texts, prompt_type, rationale, batch_tokens, show_progress)
        return embeddings, [str(self.policy.tokenizer.decode(ids.tolist(), skip_special_tokens=False)) for ids in rationales]

    def _run(
        self,
        texts: Iterable[str],
        prompt_type: str | None,
        rationale: RationaleFor | bool | None,
        batch_tokens: int | None,
        show_progress: bool,
    ) -> tuple[np.ndarray, list[Tensor], np.ndarray | None]:
        """Returns embeddings, the rationales' ids without their end token, and the prompts' embeddings if the engine gives them."""
        texts = strings_of(texts)
        self.settings.instruction_for(prompt_type)  # checks the type
        budget = self.batch_tokens if batch_tokens is None else _positive(batch_tokens)
        if not texts:
            return np.zeros((0, self.dimension), dtype=np.float32), [], None
        policy = self.policy
        rationale = self.writes(prompt_type) if rationale is None else rationale_for(rationale) in ("both", prompt_type)
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        distinct = list(place)
        prompts = self.renderers[prompt_type](distinct)
        embeddings = np.zeros((len(distinct), self.dimension), dtype=np.float32)
        plain: np.ndarray | None = np.zeros_like(embeddings)
        rationales: list[Tensor] = [torch.empty(0, dtype=torch.long)] * len(distinct)
        order = prompts.lengths.argsort(descending=True, stable=True)  # like lengths together: less padding
        holding = getattr(self.engine, "holding", None)
        with (
            torch.autocast(policy.device.type, torch.bfloat16, enabled=self.bf16),
            evaluation_mode(policy),
            holding(policy) if rationale and holding else nullcontext(),
            tqdm(total=len(distinct), unit="text", disable=not show_progress) as bar,
        ):
            for rows in order.split(self.texts_at_a_time):
                part, places = prompts.select(rows), rows.tolist()
                if rationale:
                    seeds = torch.tensor([_seed(distinct[i], self.seed) for i in places])
                    rollouts = self.engine.generate(policy, part, n=1, temperature=self.temperature, seed=seeds)
                else:
                    rollouts = without_rationales(part, policy.pad_id).to(policy.device)
                pooled = embed_all(policy, rollouts, budget) if rollouts.embeddings is None else rollouts.embeddings
                embeddings[places] = pooled.float().cpu().numpy()
                if plain is None or rollouts.prompt_embeddings is None:
                    plain = None
                else:
                    plain[places] = rollouts.prompt_embeddings.float().cpu().numpy()
                ends = rollouts.finished & (rollouts.rationale_lengths > 0)
                for row, ids, ended in zip(places, rollouts.rationales(), ends.tolist(), strict=True):
                    rationales[row] = ids[:-1].cpu() if ended else ids.cpu()
                bar.update(len(places))
        bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
        if len(bad):
            raise ValueError(
                f"{len(bad)} of {len(distinct)} embeddings are not finite, the first that of the text {distinct[bad[0]][:80]!r}: "
                "the policy's weights or its arithmetic overflow"
            )
        index = [place[text] for text in texts]
        return embeddings[index], [rationales[i] for i in index], None if plain is None else plain[index]


def strings_of(texts: Iterable[str]) -> list[str]:
    """Returns the texts of any iterable as a list.

    Raises:
        TypeError: one string in place of several, something without an order of texts, or something that is no string.
    """
    if isinstance(texts, str):
        raise TypeError("texts is one string: give a list of texts, as in encode([text])")
    if isinstance(texts, bytes | Mapping | Set) or not isinstance(texts, Iterable) or hasattr(texts, "columns"):
        raise TypeError(f"texts is of type {type(texts).__name__}: give strings in an order, such as a list, an array or one column")
    found = list(texts)
    for place, text in enumerate(found):
        if not isinstance(text, str):
            raise TypeError(f"texts[{place}] is {text!r:.80}, of type {type(text).__name__}: every text must be a string")
    return found


def _seed(text: str, seed: int) -> int:
    """Returns a seed, not negative and below 2**63, that depends on the text and on `seed` alone."""
    digest = hashlib.sha256(f"{seed} {text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _positive(batch_tokens: int) -> int:
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens={batch_tokens}: it must be at least 1")
    return batch_tokens
