"""Runs of GRACE that one process and several must agree on. As a program it is what each of several does:
`torchrun --nproc-per-node=2 -m tests.two_processes <folder>` leaves what came of them there.
"""

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed
from torch.distributed.fsdp import FSDPModule

from src.callbacks.export import Export
from src.callbacks.monitoring import undisturbed
from src.callbacks.random_states import RandomStates
from src.modules.distributed.fsdp import summon_full_params, unsharded_copy
from src.modules.grace import GRACE
from src.modules.objectives.advantages import reinforce_pp_baseline, remax, rloo
from src.modules.objectives.losses import ppo_clip, reinforce
from src.modules.objectives.plackett_luce import PlackettLuce
from src.modules.objectives.rewards import Novelty, document, listwise, paper
from src.modules.prompt.renderer import Prompts
from src.modules.training.finite import NonFiniteError
from src.modules.types import Embeddings, Reward, Rollouts
from src.records import Triplet
from src.utils.checkpoint_io import FolderCheckpoints
from src.utils.sharded_strategy import ShardedStrategy
from tests.builders import SENTENCES, loader, make, quiet_trainer
from tests.drawn import DrawnRationales

TEXTS = [*SENTENCES, *(sentence[::-1] for sentence in SENTENCES)]
BATCH = [Triplet(f"f:{i}", TEXTS[i][:20], TEXTS[i], (TEXTS[i + 1][3:50], TEXTS[i + 2][:30])) for i in range(8)]


class Short(DrawnRationales):
    """Some end before their limit of 7 tokens, and some do not."""

    mean_length = 6


class WithoutStates(Short):
    """Ids alone, so that a pass computes the rest, for as many prefixes as this rank's longest rationale has."""

    def generate(self, *args: Any, **kwargs: Any) -> Rollouts:
        return replace(super().generate(*args, **kwargs), logprobs=None, embeddings=None, prefix_embeddings=None, prompt_embeddings=None)


class OddOnesNeverEnd(Short):
    """Rationales of every second positive are truncated: with two ranks all those of the second."""

    def generate(self, policy: Any, prompts: Prompts, n: int = 1, *args: Any, **kwargs: Any) -> Rollouts:
        rollouts = super().generate(policy, prompts, n, *args, **kwargs)
        ranks = distributed.get_world_size() if distributed.is_initialized() else 1
        rank = distributed.get_rank() if ranks > 1 else 0
        even = (rank + ranks * torch.arange(len(prompts))) % 2 == 0
        return replace(rollouts, finished=even.repeat_interleave(n))


def broken_reward(e: Embeddings) -> Reward:
    """Not a number for the third rollout of the second instance, which is the second rank's."""
    good = document(e)
    total = good.total.clone()
    total[1, 2] = torch.nan
    return Reward({**good.terms, "mine": total}, {**good.weights, "mine": 1.0}, total)


def exploding_loss(*args: Tensor) -> Any:
    """Infinite on the last rank alone."""
    result = ppo_clip(*args)
    last = not distributed.is_initialized() or distributed.get_rank() == distributed.get_world_size() - 1
    return replace(result, loss=result.loss * torch.inf) if last else result


def module_with(engine: type[Short] = Short, inner: bool = False, untied: bool = False, **settings: Any) -> GRACE:
    """A module for the runs.

    Args:
        inner: the last state before the last layer is the embedding, and that layer and what follows has no part in it.
        untied: the output layer has weights of its own, which embeddings do not read.
    """
    pooling = {"pooling": "eos", "layer": -2} if inner else {}
    module = make(**{"engine": engine(7), "seed": 3, "micro_batch_tokens": 120, "max_grad_norm": 1.0, **pooling, **settings})
    if untied:
        model = module.policy.model
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return module


SCENARIOS: dict[str, Callable[[], GRACE]] = {
    "several updates": lambda: module_with(reward=listwise, algorithm={"updates_per_batch": 2}),
    "credit by token, all roles": lambda: module_with(
        reward=listwise, also_learn_from=["query", "negative"], algorithm={"gae_lambda": 0.9, "updates_per_batch": 2}
    ),
    "credit by token, from a pass": lambda: module_with(WithoutStates, reward=paper, algorithm={"gae_lambda": 0.9, "truncation": "none"}),
    "statistics of the batch": lambda: module_with(
        reward=document, algorithm={"advantage": reinforce_pp_baseline, "kl_coef": 0.1, "updates_per_batch": 2}
    ),
    "greedy baseline": lambda: module_with(reward=paper, encoder="frozen", algorithm={"advantage": remax, "greedy_baseline": True}),
    "groups gathered": lambda: module_with(
        reward=document, algorithm={"min_group_std": 0.045, "max_extra_batches": 1, "truncation": "none"}
    ),
    "a rank without tokens": lambda: module_with(
        OddOnesNeverEnd, reward=document, algorithm={"truncation": "mask", "updates_per_batch": 2}
    ),
    "adapters": lambda: module_with(reward=listwise, lora=True),
    "pathwise": lambda: module_with(
        reward=listwise, pathwise_weight=0.7, gradient_parts_every_n_rollout_batches=1, untied=True, algorithm={"updates_per_batch": 2}
    ),
    "pathwise, queries learned from": lambda: module_with(
        reward=listwise,
        also_learn_from=["query"],
        pathwise_weight=0.7,
        gradient_parts_every_n_rollout_batches=2,
        algorithm={"updates_per_batch": 2},
    ),
    "pathwise, adapters, positives alone": lambda: module_with(
        reward=listwise, lora=True, pathwise_weight=0.7, pathwise_roles=["positive"], gradient_parts_every_n_rollout_batches=1
    ),
    "pathwise alone, inner layer": lambda: module_with(
        reward=paper, inner=True, untied=True, score_function_weight=0.0, pathwise_weight=0.7, algorithm={"updates_per_batch": 2}
    ),
    "pathwise, a rank without tokens": lambda: module_with(
        OddOnesNeverEnd, reward=document, pathwise_weight=0.7, gradient_parts_every_n_rollout_batches=1, algorithm={"truncation": "mask"}
    ),
    "a reward that remembers": lambda: module_with(reward=Novelty(document, novelty_weight=1.0), pathwise_weight=0.7),
    "distillation": lambda: module_with(reward=listwise, distill_weight=0.7, algorithm={"updates_per_batch": 2}),
    "distillation alone, from a pass": lambda: module_with(
        WithoutStates, reward=listwise, score_function_weight=0.0, distill_weight=0.7, distill_loss="cosine"
    ),
    "sampled rankings, pairs of rationales": lambda: module_with(
        reward=PlackettLuce(rankings=4),
        micro_batch_tokens=128,
        pathwise_weight=0.7,
        algorithm={"advantage": rloo, "loss": reinforce, "kl_coef": 0.1, "kl_estimator": "k1", "kl_in": "pairs", "updates_per_batch": 2},
    ),
    "the same query on two ranks": lambda: module_with(reward=listwise, pathwise_weight=0.7),
    "pathwise, no negatives": lambda: module_with(reward=document, pathwise_reward=listwise, pathwise_weight=0.7),
}
BROKEN: dict[str, Callable[[], GRACE]] = {
    "reward": lambda: module_with(reward=broken_reward),
    "gradient": lambda: module_with(reward=document, algorithm={"loss": exploding_loss}),
}


def sgd(module: GRACE) -> Any:
    """In AdamW's place, which makes full steps of a gradient that is 0 but for rounding: by this weights differ as gradients do."""
    optimizer = torch.optim.SGD([p for p in module.policy.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)}


class Compared(L.Callback):
    """Keeps what is to be compared."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {"batches": []}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        r = pl_module.batch_metrics
        numbers = {"rollout_tokens": r.rollout_tokens, "update_tokens": r.update_tokens, "distinct": r.distinct_rationales}
        self.seen["batches"].append(
            {
                "ids": r.instance_ids,
                "reward": r.reward.total,
                "others": r.other_rewards,
                "advantages": r.advantages,
                "lengths": r.rationale_lengths,
                "update": r.update,
                "mismatch": r.logprob_mismatch,
                "numbers": {**numbers, "unrelated": r.unrelated_similarity, "false_negatives": r.false_negatives},
            }
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        with undisturbed(pl_module):
            self.seen["embeddings"] = torch.from_numpy(pl_module.encoder().encode(SENTENCES))
        whole = unsharded_copy(pl_module.policy) if isinstance(pl_module.policy, FSDPModule) else pl_module.policy
        if whole is not None:
            self.seen["weights"] = {name: p.detach().clone() for name, p in whole.named_parameters()}


class SaveAfterTheFirst(L.Callback):
    """Twice in the same place, of which the second replaces the first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        for _ in range(2 if trainer.current_epoch == 0 else 0):
            trainer.save_checkpoint(self.path)


def trainer_of(
    strategy: Any, devices: int, callbacks: list[L.Callback], batches: int = 2, epochs: int = 1, precision: Any = "32-true"
) -> L.Trainer:
    more = {"max_epochs": epochs, "limit_train_batches": batches, "use_distributed_sampler": False, "plugins": [FolderCheckpoints()]}
    return quiet_trainer(*callbacks, strategy=strategy, devices=devices, precision=precision, **more)


TWO_BATCHES = (BATCH, BATCH[::-1])


def batches_of(name: str) -> Any:
    """What a scenario is trained on."""
    if name.endswith("no negatives"):
        return [[replace(triplet, negatives=()) for triplet in batch] for batch in TWO_BATCHES]
    if name == "the same query on two ranks":
        return [[replace(triplet, query=BATCH[0].query) if triplet.id == "f:1" else triplet for triplet in batch] for batch in TWO_BATCHES]
    return TWO_BATCHES


def fit(module: GRACE, strategy: Any = "auto", devices: int = 1, batches: Any = TWO_BATCHES, precision: str = "32-true") -> dict[str, Any]:
    """The results of two batches."""
    module.configure_optimizers = functools.partial(sgd, module)  # type: ignore[method-assign]
    watch = Compared()
    trainer_of(strategy, devices, [watch], precision=precision).fit(module, loader(batches))
    return watch.seen


def error_of(module: GRACE, strategy: Any, devices: int, batches: Any = TWO_BATCHES) -> str:
    """What stops a run, and whether it left the weights alone."""
    before = {name: p.detach().clone() for name, p in module.policy.named_parameters()}
    try:
        fit(module, strategy, devices, batches)
    except (NonFiniteError, ValueError) as error:
        with summon_full_params(module.policy):
            same = all(torch.equal(before[name], p) for name, p in module.policy.named_parameters())
        return f"{error}\nthe same weights: {same}"
    return "nothing"


def go_on(strategy: Callable[[], Any], folder: Path) -> dict[str, dict[str, Any]]:
    """A run by AdamW of two batches that is saved after the first, and another that goes on from there: what each saw."""
    seen = {}
    for name, callback in {"never stopped": SaveAfterTheFirst(folder / "one.ckpt"), "gone on with": Export(f"{folder}_export")}.items():
        watch = Compared()
        checkpoint = folder / "one.ckpt" if name == "gone on with" else None
        trainer = trainer_of(strategy(), 2, [watch, RandomStates(), callback], batches=1, epochs=2)
        module = module_with(reward=Novelty(document, novelty_weight=1.0), learning_rate=1e-3)  # whose second batch needs what it remembers
        trainer.fit(module, loader(TWO_BATCHES), ckpt_path=checkpoint, weights_only=True)
        seen[name] = watch.seen
    return seen


def main(folder: Path, rank: int) -> None:
    """All runs, by DDP and by FSDP: rank zero's results, and the errors of both."""
    strategies: dict[str, Callable[[], Any]] = {
        "ddp": lambda: DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True),
        "fsdp": ShardedStrategy,
    }
    for kind, strategy in strategies.items():
        results = {name: fit(module(), strategy(), 2, batches_of(name)) for name, module in SCENARIOS.items()}
        results |= go_on(strategy, folder / kind)
        if kind == "fsdp":
            results["bfloat16 sums"] = fit(SCENARIOS["several updates"](), ShardedStrategy("bfloat16"), 2)
            gathered = ShardedStrategy(gather_dtype="bfloat16")
            results["bfloat16 weights"] = fit(SCENARIOS["several updates"](), gathered, 2, precision="bf16-mixed")
        if rank == 0:
            torch.save(results, folder / f"{kind}.pt")
        for name, module in BROKEN.items():
            (folder / f"{kind} {name} {rank}.txt").write_text(error_of(module(), strategy(), 2))
    others = [BATCH[rank : rank + 4]], [BATCH[:5]]
    for name, batches in zip(("different", "uneven"), others, strict=True):
        error = error_of(module_with(reward=document), strategies["ddp"](), 2, batches)
        (folder / f"ddp {name} {rank}.txt").write_text(error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(os.environ["RANK"]))
