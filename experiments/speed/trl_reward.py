"""GRACE's reward as a user of TRL would write it: generate for queries and negatives, encode all, compare."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from src.modules.objectives.rewards import listwise
from src.modules.policy.pooling import pool
from src.modules.prompt.renderer import PromptRenderer, Prompts
from src.modules.types import Embeddings, Rollouts, join


class ListwiseReward:
    """A reward function for GRPOTrainer. Its data set has columns `document`, `query` and `negative`.

    Args:
        model: the one that is trained: embeddings are those of the live policy.
        renderer: of the prompts, with the tokenizer that TRL has.
        new_tokens: rationales of queries and negatives have that many.
        rollouts: K.
        batch_size: sequences in one encode pass.
    """

    def __init__(self, model: PreTrainedModel, renderer: PromptRenderer, new_tokens: int, rollouts: int, batch_size: int) -> None:
        self.model, self.renderer, self.k, self.batch_size = model, renderer, rollouts, batch_size
        tokenizer = renderer.tokenizer
        self.pad_id = int(tokenizer.pad_token_id)
        self.generation = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=0.5,
            top_k=0,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=self.pad_id,
        )
        self.__name__ = "listwise"

    @torch.no_grad()
    def __call__(
        self, completion_ids: Sequence[Sequence[int]], document: list[str], query: list[str], negative: list[str], **_: Any
    ) -> list[float]:
        """A reward for each completion; rows come K to a document."""
        training = self.model.training
        self.model.eval()
        documents = self.renderer(document)
        positive = self._embed(documents, [torch.tensor(ids) for ids in completion_ids])
        others = self.renderer(query[:: self.k] + negative[:: self.k])
        other = self._embed(others, self._generate(others))
        self.model.train(training)
        b = len(query) // self.k
        embeddings = Embeddings.normalised(other[:b], positive.unflatten(0, (b, self.k)), other[b:].unsqueeze(1))
        rewards: list[float] = listwise(embeddings, temperature=0.05).total.flatten().tolist()
        return rewards

    def _generate(self, prompts: Prompts) -> list[Tensor]:
        longest = int(prompts.lengths.max())
        ids = torch.full((len(prompts), longest), self.pad_id)
        for row, prompt in zip(ids, prompts.ids, strict=True):
            row[longest - len(prompt) :] = prompt
        mask = (torch.arange(longest) >= longest - prompts.lengths.unsqueeze(1)).long()
        device = self.model.device
        out = self.model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=self.generation)
        return list(out[:, longest:].cpu())

    def _embed(self, prompts: Prompts, rationales: Sequence[Tensor]) -> Tensor:
        rollouts = join(prompts, rationales, torch.ones(len(rationales), dtype=torch.bool), self.pad_id)
        rows = torch.arange(len(rollouts)).split(self.batch_size)
        return torch.cat([self._pooled(rollouts[part].to(self.model.device)) for part in rows])

    def _pooled(self, rollouts: Rollouts) -> Tensor:
        hidden = self.model.base_model(input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask.long()).last_hidden_state
        return pool(hidden, rollouts.pooling_mask)
