"""Tokens a second of the rollout engines: same policy, prompts and lengths, rounds alternating.

python -m experiments.speed.rollouts [--repeats 5] [--output experiments/speed/rollouts.md]
"""

import argparse
import importlib.util
import logging
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from experiments.speed.floor import copy_rate, matmul_rate
from experiments.speed.measuring import alternating, machine, paired_ratio, report, table
from experiments.speed.subject import POLICY, triplets, unending_policy
from src.modules.plan.memory import shape_of
from src.modules.plan.speed import reading, writing
from src.modules.policy.model import Policy
from src.modules.prompt.renderer import Prompts
from src.modules.rollouts.hf import HFEngine

Engine = Callable[[Prompts, int], int]
"""(prompts, rationales of each) -> tokens written."""

FEW = 64  # sequences at a time, where generate is fastest on a CPU: larger batches fall out of its cache
PAGE = 256  # tokens a page of continuous batching's cache holds, its own default


def ours(policy: Policy, new_tokens: int) -> Engine:
    """`rollout=hf`, which also gathers log-probs and embeddings."""
    engine = HFEngine(new_tokens)
    return lambda prompts, n: int(engine.generate(policy, prompts, n, temperature=1.0).rationale_lengths.sum())


def vllm(policy: Policy, new_tokens: int, max_prompt_tokens: int) -> Engine:
    """`rollout=vllm`, which also pushes the weights; without an end token, as vLLM refuses one outside of the vocabulary,
    and without a seed for each prompt, as it draws more slowly with them.
    """
    from src.modules.rollouts.vllm import VLLMEngine

    class Unending(VLLMEngine):
        def _requests(self, *args: Any) -> list[tuple[Any, Any]]:
            requests = super()._requests(*args)
            for _, params in requests:
                params.stop_token_ids, params.ignore_eos, params.seed = [], True, None
            return requests

    engine = Unending(new_tokens, max_prompt_tokens)
    return lambda prompts, n: int(engine.generate(policy, prompts, n, temperature=1.0).rationale_lengths.sum())


def _config(policy: Policy, new_tokens: int, n: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,  # the default of 50 is another distribution
        num_return_sequences=n,
        eos_token_id=policy.tokenizer.eos_token_id,
        pad_token_id=policy.pad_id,
    )


def transformers_generate(policy: Policy, new_tokens: int, at_once: int | None = None) -> Engine:
    """`model.generate`, padded on the left: all prompts in one batch, or so many sequences at a time, which its cache may like."""

    def run(prompts: Prompts, n: int) -> int:
        parts = torch.arange(len(prompts)).split(len(prompts) if at_once is None else max(1, at_once // n))
        return sum(batch(prompts.select(part), n) for part in parts)

    def batch(prompts: Prompts, n: int) -> int:
        longest = int(prompts.lengths.max())
        ids = torch.full((len(prompts), longest), policy.pad_id)
        for row, prompt in zip(ids, prompts.ids, strict=True):
            row[longest - len(prompt) :] = prompt
        mask = torch.arange(longest) >= longest - prompts.lengths.unsqueeze(1)
        with torch.no_grad():
            out = policy.model.generate(
                ids.to(policy.device), attention_mask=mask.long().to(policy.device), generation_config=_config(policy, new_tokens, n)
            )
        return int(out[:, longest:].numel())

    return run


def continuous_batching(policy: Policy, new_tokens: int) -> Engine:
    """`model.generate_batch`, its cache as large as all sequences together."""

    def run(prompts: Prompts, n: int) -> int:
        rows = len(prompts) * n
        pages = rows * -(-(int(prompts.lengths.max()) + new_tokens) // PAGE)
        sizes = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages + 1, max_batch_tokens=4096, max_requests_per_batch=rows)
        ids = [prompt.tolist() for prompt in prompts.ids]
        out: dict[str, Any] = policy.model.generate_batch(
            ids, generation_config=_config(policy, new_tokens, n), continuous_batching_config=sizes
        )
        tokens = sum(len(result.generated_tokens) for result in out.values())
        if tokens != rows * new_tokens:  # it logs what fails and does not raise
            raise RuntimeError(f"continuous batching wrote {tokens} tokens, not {rows * new_tokens}: see its log above")
        return tokens

    return run


def compare(engines: dict[str, Engine], prompts: Prompts, n: int, new_tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of every engine in every round, after a small run of each to warm up.

    Raises:
        RuntimeError: an engine that did not write as much as the others.
    """
    few = prompts.select(torch.arange(min(2, len(prompts))))
    wanted = len(prompts) * n * new_tokens
    written: dict[str, int] = {}

    def once(name: str) -> None:
        written[name] = engines[name](prompts, n)

    for engine in engines.values():
        engine(few, n)
    seconds = alternating({name: lambda name=name: once(name) for name in engines}, repeats)  # type: ignore[misc]
    for name, tokens in written.items():
        if tokens != wanted:
            raise RuntimeError(f"{name} wrote {tokens} tokens, not {wanted}: the comparison would not be fair")
    return seconds


def section(policy: Policy, seconds: dict[str, list[float]], prompts: Prompts, n: int, new_tokens: int) -> str:
    """The table of one K, and the floor below it."""
    tokens = len(prompts) * n * new_tokens
    first = next(iter(seconds))
    rows = [
        [name, f"{statistics.median(own):.2f}", f"{tokens / statistics.median(own):,.0f}", f"{paired_ratio(own, seconds[first]):.2f}"]
        for name, own in seconds.items()
    ]
    shape, best, lengths = shape_of(policy.model.config), statistics.median(seconds[first]), prompts.lengths.tolist()
    parts = (reading(shape, lengths, 4), writing(shape, lengths, n, new_tokens, 4))
    flops, moved = sum(part.flops for part in parts), sum(part.bytes for part in parts)
    rate, copying = matmul_rate(shape, len(prompts) * n), copy_rate()
    arithmetic, copied = flops / rate, moved / copying
    return (
        f"## K = {n}: {len(prompts)} prompts, {new_tokens} new tokens each\n\n"
        + table(["engine", "seconds", "tokens/s", f"time / time of {first}"], rows)
        + f"\nArithmetic: {flops / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s take {arithmetic:.2f} s. "
        + f"Reading: {moved / 1e9:.1f} GB at {copying / 1e9:.1f} GB/s take {copied:.2f} s. "
        + f"{first} takes {best / max(arithmetic, copied):.1f} times the larger, {best / (arithmetic + copied):.1f} times both.\n"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default=str(POLICY))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rollouts", type=int, nargs="+", default=[1, 8], help="K")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--packages", nargs="+", default=["sklearn", "sqlalchemy"], help="whose docstrings")
    parser.add_argument("--output", type=Path)
    a = parser.parse_args(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    policy, renderer = unending_policy(a.policy)
    policy.eval()
    prompts = renderer([triplet.positive for triplet in triplets(renderer, a.prompts, a.packages)])
    engines = {
        "rollout=hf": ours(policy, a.new_tokens),
        "transformers generate": transformers_generate(policy, a.new_tokens),
        f"transformers generate, {FEW} at a time": transformers_generate(policy, a.new_tokens, FEW),
        "transformers continuous batching": continuous_batching(policy, a.new_tokens),
    }
    text = f"{machine()}, {a.repeats} rounds\n\n"
    if importlib.util.find_spec("vllm"):
        engines["rollout=vllm"] = vllm(policy, a.new_tokens, renderer.max_prompt_tokens)
    else:
        text += "vLLM is not installed here (`make vllm`): it is not in the tables.\n\n"
    sections = [section(policy, compare(engines, prompts, n, a.new_tokens, a.repeats), prompts, n, a.new_tokens) for n in a.rollouts]
    report(text + "\n".join(sections), a.output)


if __name__ == "__main__":
    main()
