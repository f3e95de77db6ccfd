"""Texts to embeddings as they are scored: the policy writes a rationale about each text, and both are pooled."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from src.modules.encoder.export import load_policy
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy.model import Policy
from src.modules.prompt.renderer import PromptRenderer, Prompts, require_room
from src.modules.rollouts.hf import HFEngine
from src.modules.types import Rollouts, without_rationales


class RolloutEngine(Protocol):
    """What writes rationales of at most `max_new_tokens`: `n` for each prompt, greedily at temperature 0, the same for the same seed.

    The seed is one for all prompts, or [N] int64, one for each: what a prompt draws then depends on no other prompt. An engine
    that takes the weights over may have `holding(policy)`, a context in which it does so once for all calls.
    """

    max_new_tokens: int

    def generate(
        self, policy: Policy, prompts: Prompts, n: int, temperature: float, seed: int | Tensor, prefixes: bool = False
    ) -> Rollouts: ...


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every submodule is in the mode it was in (a frozen one stays frozen)."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


class RationaleEncoder:
    """Embeds texts with a policy, with its rationales or without.

    `RationaleEncoder.from_pretrained(folder).encode(texts)` is all that most need. A text's embedding does
    not depend on the texts beside it, but for rounding.

    Args:
        policy: the model; its mode and gradients are as before after every call.
        settings: prompt and pooling.
        engine: writes the rationales; it sets their greatest length. Unused without rationales.
        rationale: False pools the prompt alone (the paper's Base).
        temperature: of the rationales; 0 is greedy.
        seed: of sampled rationales. A text draws from its own content and this seed, so that it gets the same rationale
            among any other texts, and after a restart.
        batch_size: texts at a time.

    Raises:
        ValueError: a negative temperature, a batch size below one, settings that pool otherwise than the policy does, lengths
            that its context does not hold, or a tokenizer without a chat template.
    """

    def __init__(
        self,
        policy: Policy,
        settings: EncoderSettings,
        engine: RolloutEngine,
        rationale: bool = True,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        if temperature < 0:
            raise ValueError(f"temperature={temperature}: it is 0 (greedy) or above")
        if (settings.pooling, settings.layer) != (policy.pooling, policy.layer):
            raise ValueError(
                f"the encoder's settings say pooling={settings.pooling}, layer={settings.layer}, and the policy pools by "
                f"{policy.pooling} at layer {policy.layer}: make both the same"
            )
        require_room(policy.context, settings.max_prompt_tokens, engine.max_new_tokens if rationale else 0)
        self.policy, self.settings, self.engine = policy, settings, engine
        self.rationale, self.temperature, self.seed, self.batch_size = rationale, temperature, seed, _positive(batch_size)
        self.renderers = {side: self._renderer(side) for side in ("query", "document", None)}

    def _renderer(self, prompt_type: str | None) -> PromptRenderer:
        s = self.settings
        return PromptRenderer(self.policy.tokenizer, s.instruction_for(prompt_type), s.max_prompt_tokens, dict(s.template_kwargs))

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        device: str | torch.device | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 64,
        trust_remote_code: bool = False,
    ) -> "RationaleEncoder":
        """The encoder of an exported folder, of a training checkpoint (*.ckpt), or of an instruct model on the hub.

        Args:
            path: of the folder or checkpoint, or the model's name.
            device: where it works; None takes a GPU where there is one.
            max_new_tokens: longest rationale; None: what the model was trained with.
            temperature, seed, batch_size: see RationaleEncoder.
            trust_remote_code: lets Python files that come with a model run; an export needs none.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: a checkpoint that GRACE did not write, or a setting without sense.
        """
        policy, settings = load_policy(path, trust_remote_code)
        if max_new_tokens is not None:
            settings = replace(settings, max_new_tokens=max_new_tokens)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        engine = HFEngine(settings.max_new_tokens)
        own = settings.rationale  # what was trained without rationales is read without
        return cls(policy.to(device), settings, engine, own, temperature=temperature, seed=seed, batch_size=batch_size)

    @property
    def dimension(self) -> int:
        """Size of an embedding."""
        return int(self.policy.model.config.get_text_config().hidden_size)

    def encode(
        self,
        texts: Sequence[str],
        prompt_type: str | None = None,
        rationale: bool | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> np.ndarray:
        """Embeddings, in the order of the texts.

        Args:
            texts: any number of them; one that occurs again is read once.
            prompt_type: `query` or `document`. They are read alike, as GRACE was trained, unless the settings have a
                `query_instruction`.
            rationale: whether rationales are written; None: as the encoder was made, which is as its policy was trained.
            batch_size: texts at a time; None: the encoder's own.
            show_progress: a bar of texts done and time left, on standard error.

        Returns:
            [N, D] float32, pooled and not normalised; compare them by cosine.

        Raises:
            TypeError: one string in place of a list of them.
            ValueError: an embedding that is not finite, an unknown prompt type, a batch size below one.
        """
        return self._run(texts, prompt_type, rationale, batch_size, show_progress)[0]

    def encode_both(
        self, texts: Sequence[str], prompt_type: str | None = None, batch_size: int | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Embeddings with rationales and without, [N, D] float32 each, from one pass.

        The second are those of `encode(rationale=False)`, but for rounding: the engine meets them before it writes. They are None
        from an engine that gives ids alone. The arguments are those of `encode`.
        """
        with_rationales, _, plain = self._run(texts, prompt_type, True, batch_size, False)
        return with_rationales, plain

    def explain(
        self,
        texts: Sequence[str],
        prompt_type: str | None = None,
        rationale: bool | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> tuple[np.ndarray, list[str]]:
        """Embeddings as from `encode`, whose arguments these are, and the rationale of each text ("" without rationales).

        Fences such as <think> are shown even where the tokenizer counts them as special tokens.
        """
        embeddings, rationales, _ = self._run(texts, prompt_type, rationale, batch_size, show_progress)
        return embeddings, [str(self.policy.tokenizer.decode(ids.tolist(), skip_special_tokens=False)) for ids in rationales]

    def _run(
        self, texts: Sequence[str], prompt_type: str | None, rationale: bool | None, batch_size: int | None, show_progress: bool
    ) -> tuple[np.ndarray, list[Tensor], np.ndarray | None]:
        """Embeddings, the ids of the rationales without what ended them, and the embeddings of the prompts, where the engine gives them."""
        if isinstance(texts, str):
            raise TypeError("texts is one string: give a list of texts, as in encode([text])")
        self.settings.instruction_for(prompt_type)  # refuses a side that does not exist
        size = self.batch_size if batch_size is None else _positive(batch_size)
        if not texts:
            return np.zeros((0, self.dimension), dtype=np.float32), [], None
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # a repeated text is written about once
        distinct = list(place)
        prompts = self.renderers[prompt_type](distinct)
        embeddings = np.zeros((len(distinct), self.dimension), dtype=np.float32)
        plain: np.ndarray | None = np.zeros_like(embeddings)
        rationales: list[Tensor] = [torch.empty(0, dtype=torch.long)] * len(distinct)
        order = prompts.lengths.argsort(descending=True, stable=True)  # like lengths together: less padding
        rationale = self.rationale if rationale is None else rationale
        with (
            evaluation_mode(self.policy),
            self._holding(rationale),
            tqdm(total=len(distinct), unit="text", disable=not show_progress) as bar,
        ):
            for rows in order.split(size):
                seeds = _own_seeds([distinct[i] for i in rows.tolist()], self.seed)
                rollouts = self._rollouts(prompts.select(rows), rationale, seeds)
                pooled = self.policy.embed(rollouts) if rollouts.embeddings is None else rollouts.embeddings
                embeddings[rows.numpy()] = pooled.float().cpu().numpy()
                if plain is None or rollouts.prompt_embeddings is None:
                    plain = None
                else:
                    plain[rows.numpy()] = rollouts.prompt_embeddings.float().cpu().numpy()
                ends = rollouts.finished.cpu() & (rollouts.rationale_lengths > 0).cpu()
                for row, ids, ended in zip(rows.tolist(), rollouts.rationales(), ends.tolist(), strict=True):
                    rationales[row] = ids[:-1].cpu() if ended else ids.cpu()
                bar.update(len(rows))
        _check_finite(embeddings, distinct)
        index = [place[text] for text in texts]
        return embeddings[index], [rationales[i] for i in index], None if plain is None else plain[index]

    def _holding(self, rationale: bool) -> AbstractContextManager[None]:
        holding = getattr(self.engine, "holding", None)
        return holding(self.policy) if rationale and holding else nullcontext()

    def _rollouts(self, prompts: Prompts, rationale: bool, seeds: Tensor) -> Rollouts:
        if rationale:
            return self.engine.generate(self.policy, prompts, n=1, temperature=self.temperature, seed=seeds)
        return without_rationales(prompts, self.policy.pad_id).to(self.policy.device)


def _own_seeds(texts: Sequence[str], seed: int) -> Tensor:
    """[N] int64, not negative: a seed for each text that depends on it and on `seed` alone."""
    digests = (hashlib.sha256(f"{seed} {text}".encode("utf-8", "surrogatepass")).digest() for text in texts)
    return torch.tensor([int.from_bytes(digest[:8], "big") >> 1 for digest in digests])


def _positive(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: it must be at least 1")
    return batch_size


def _check_finite(embeddings: np.ndarray, texts: Sequence[str]) -> None:
    bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(texts)} embeddings are not finite, the first that of the text {texts[bad[0]][:80]!r}: "
            "the policy's weights or its arithmetic overflow"
        )
