"""Encoders of the tiny policy that write at most four tokens."""

import numpy as np

from src.modules.encoder.encoder import RationaleEncoder
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy.model import Policy
from src.modules.rollouts.hf import HFEngine

SETTINGS = EncoderSettings(instruction="Name the terms.", max_prompt_tokens=96, max_new_tokens=4)


class Recording(RationaleEncoder):
    """Keeps the texts that it embeds, and the prompt type of each call."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        self.seen, self.prompt_types = list[str](), list[str | None]()

    def encode(self, texts: list[str], prompt_type: str | None = None, **options: object) -> np.ndarray:
        self.seen += texts
        self.prompt_types.append(prompt_type)
        return super().encode(texts, prompt_type, **options)


def encoder(policy: Policy, settings: EncoderSettings = SETTINGS, new_tokens: int = 4, **options: object) -> Recording:
    return Recording(policy, settings, HFEngine(new_tokens), **options)
