"""Texts a second of embedding with greedy rationales: RationaleEncoder against generate, decode, tokenise again, encode.

python -m experiments.speed.evaluation [--repeats 5] [--output experiments/speed/evaluation.md]
"""

import argparse
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from experiments.speed.measuring import alternating, machine, paired_ratio, report, table
from experiments.speed.subject import POLICY, triplets
from src.modules.encoder.encoder import RationaleEncoder
from src.modules.encoder.export import load_policy
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy.model import Policy
from src.modules.policy.pooling import pool
from src.modules.prompt.renderer import PromptRenderer
from src.modules.rollouts.hf import HFEngine


class GenerateThenEncode:
    """The usual way: rationales by `model.generate`, decoded, set behind their chats, and all of it encoded as new text.

    Batches are of like lengths, as in RationaleEncoder.
    """

    def __init__(self, policy: Policy, settings: EncoderSettings, batch_size: int) -> None:
        self.policy, self.tokenizer, self.settings, self.batch_size = policy, policy.tokenizer, settings, batch_size
        frame = self._chat("SLOT").partition("SLOT")[0]
        self.prefix = len(self.tokenizer(frame, add_special_tokens=False)["input_ids"])  # tokens that are not pooled

    def encode(self, texts: Sequence[str]) -> Tensor:
        """[N, D] float32 embeddings in the order of the texts."""
        chats = [self._chat(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
        embeddings = torch.zeros(len(texts), self.policy.model.config.hidden_size)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            rationales = self._generate([chats[i] for i in rows])
            embeddings[rows] = self._encode([chats[i] + rationale for i, rationale in zip(rows, rationales, strict=True)]).cpu()
        return embeddings

    def _chat(self, text: str) -> str:
        messages = [{"role": "system", "content": self.settings.instruction}, {"role": "user", "content": text}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _tokenise(self, texts: list[str], side: str) -> dict[str, Tensor]:
        encoded = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side=side, add_special_tokens=False)
        return {name: encoded[name].to(self.policy.device) for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def _generate(self, chats: list[str]) -> list[str]:
        inputs = self._tokenise(chats, "left")
        limits = {"max_new_tokens": self.settings.max_new_tokens, "do_sample": False, "pad_token_id": self.policy.pad_id}
        out = self.policy.model.generate(**inputs, **limits)
        written = self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :])  # fences such as <think> are special tokens
        return [text.split(self.tokenizer.eos_token)[0] for text in written]

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> Tensor:
        inputs = self._tokenise(texts, "right")
        mask = inputs["attention_mask"].bool()
        mask[:, : self.prefix] = False
        return pool(self.policy.model.base_model(**inputs).last_hidden_state, mask)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default=str(POLICY))
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64, help="of the other way")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--packages", nargs="+", default=["sklearn", "sqlalchemy"], help="whose docstrings")
    parser.add_argument("--output", type=Path)
    a = parser.parse_args(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    policy, settings = load_policy(a.policy)
    policy.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    renderer = PromptRenderer(policy.tokenizer, settings.instruction, settings.max_prompt_tokens)
    texts = [triplet.positive for triplet in triplets(renderer, a.texts, a.packages)]
    encoders = {
        "RationaleEncoder": RationaleEncoder(policy, settings, HFEngine(settings.max_new_tokens)),
        "generate, decode, encode": GenerateThenEncode(policy, settings, a.batch_size),
    }
    first, other = [torch.as_tensor(encoder.encode(texts[:8])) for encoder in encoders.values()]  # also warms up
    same = torch.nn.functional.cosine_similarity(first, other).mean()
    seconds = alternating({name: lambda e=encoder: e.encode(texts) for name, encoder in encoders.items()}, a.repeats)  # type: ignore[misc]
    name = next(iter(seconds))
    rows = [
        [way, f"{statistics.median(own):.2f}", f"{len(texts) / statistics.median(own):,.0f}", f"{paired_ratio(own, seconds[name]):.2f}"]
        for way, own in seconds.items()
    ]
    report(
        f"{machine()}, {a.repeats} rounds, {len(texts)} texts, the other way in batches of {a.batch_size}, greedy, at most "
        f"{settings.max_new_tokens} new tokens; mean cosine of the two ways' embeddings {same:.4f} (8 texts)\n\n"
        + table(["way", "seconds", "texts/s", f"time / time of {name}"], rows),
        a.output,
    )


if __name__ == "__main__":
    main()
