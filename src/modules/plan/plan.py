"""What a run would do and hold, from its config alone: `python train.py ... dry_run=true`. No weights are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from src.modules.plan.memory import Load, Row, always, while_sampling, while_updating
from src.modules.plan.model_shape import Shape, find_config, shape_of

_GIB = 2**30


class PlanError(ValueError):
    """Settings that do not go together."""


@dataclass(frozen=True)
class Work:
    """How a rollout batch is shared out.

    Attributes:
        nodes, devices: N = nodes * devices ranks.
        strategy: `one`, `ddp` or `fsdp`.
        instances: B of all ranks.
        rollouts, negatives: K and M.
        learned: sides with K rollouts.
        updates: optimiser steps.
        prompt, rationale, tokens: longest prompt and rationale, and a micro-batch, in tokens.
    """

    nodes: int
    devices: int
    strategy: str
    instances: int
    rollouts: int
    negatives: int
    learned: tuple[str, ...]
    updates: int
    prompt: int
    rationale: int
    tokens: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.devices

    @property
    def share(self) -> int:
        return self.instances // self.ranks

    def calls(self) -> tuple[tuple[int, int], ...]:
        """(texts, rollouts of each) that a rank asks of the rollout engine."""
        texts = {"positive": self.share, "query": self.share, "negative": self.share * self.negatives}
        rest = sum(count for side, count in texts.items() if side not in self.learned)
        return tuple((texts[side], self.rollouts) for side in self.learned) + (((rest, 1),) if rest else ())


def plan(cfg: DictConfig) -> tuple[Work, Shape, Load]:
    """What a config comes to.

    Raises:
        PlanError: numbers that do not divide, or a config that this cannot plan.
        FileNotFoundError: no config of the model.
    """
    if OmegaConf.select(cfg, "module.algorithm") is None or OmegaConf.select(cfg, "policy.path", default=None) is None:
        raise PlanError("dry_run plans GRACE training (module=grace) from a policy.path, and this config is of something else")
    work = _work(cfg)
    _check(work)
    policy, lora = cfg.policy, cfg.policy.lora
    config = find_config(policy.path, Path(cfg.paths.root, "configs", "shapes", "published.yaml"), policy.trust_remote_code)
    shape = shape_of(config, policy.train_embeddings, None if lora is None else instantiate(lora))
    load = Load(
        ranks=work.ranks,
        sharded=work.strategy == "fsdp",
        half=str(cfg.trainer.precision) in ("bf16", "bf16-mixed"),
        calls=work.calls(),
        at_once=cfg.rollout.get("batch_tokens", 0),
        prompt=work.prompt,
        rationale=work.rationale,
        rollouts=work.rollouts,
        tokens=max(work.tokens, work.prompt + work.rationale),
        prefixes=cfg.algorithm.gae_lambda is not None,
        checkpointing=policy.gradient_checkpointing,
        copies=int(cfg.algorithm.kl_coef > 0 and lora is None) + int(policy.encoder == "frozen"),
    )
    return work, shape, load


def _work(cfg: DictConfig) -> Work:
    data = cfg.datamodule
    instances = data.get("batch_size") or data.get("modules_per_batch", 0) * data.get("docstrings_per_module", 0)
    if not instances:
        raise PlanError(f"dry_run: {data._target_} names no batch_size (nor modules_per_batch), so there is no batch to plan")
    return Work(
        nodes=cfg.trainer.get("num_nodes", 1),
        devices=_devices(cfg.trainer.devices),
        strategy=_strategy(cfg.trainer.get("strategy")),
        instances=instances,
        rollouts=cfg.module.num_generations,
        negatives=data.get("negatives") or OmegaConf.select(data, "reader.negatives", default=0),
        learned=("positive", *cfg.module.also_learn_from),
        updates=cfg.algorithm.updates_per_batch,
        prompt=cfg.module.max_prompt_tokens,
        rationale=cfg.rollout.max_new_tokens,
        tokens=cfg.module.micro_batch_tokens,
    )


def _devices(devices: Any) -> int:
    if devices in ("auto", -1, "-1"):
        found = torch.cuda.device_count()
        if not found:
            raise PlanError(f"trainer.devices={devices} means all GPUs of this machine, and it has none: name the number to plan for")
        return found
    return len(devices) if OmegaConf.is_list(devices) else int(devices)


def _strategy(strategy: Any) -> str:
    name = str(strategy.get("_target_") if isinstance(strategy, DictConfig) else strategy).lower()
    return "fsdp" if "sharded" in name else "ddp" if "ddp" in name else "one"


def _check(work: Work) -> None:
    if work.strategy == "one" and work.ranks > 1:
        raise PlanError(
            f"trainer.devices={work.devices}, trainer.num_nodes={work.nodes}: several processes need trainer=ddp or trainer=fsdp"
        )
    if work.instances % work.ranks:
        raise PlanError(
            f"{work.instances} instances a batch do not divide by {work.ranks} ranks: change trainer.devices, trainer.num_nodes or the "
            "datamodule's batch (batch_size; of docstrings modules_per_batch * docstrings_per_module)"
        )
    if work.share % work.updates:
        raise PlanError(
            f"{work.share} instances a rank do not divide by algorithm.updates_per_batch={work.updates}: change it, the ranks or the batch"
        )


def show(cfg: DictConfig) -> None:
    """Prints the plan."""
    Console(width=150, highlight=False, markup=False).print(text(cfg), soft_wrap=True)


def text(cfg: DictConfig) -> str:
    """The plan as lines; errors as of `plan`."""
    work, shape, load = plan(cfg)
    lines = [f"dry run of {cfg.name} with {cfg.policy.path}: {shape.parameters:,} parameters, {shape.trained:,} of them trained", ""]
    lines += _arithmetic(work)
    held = always(shape, load)
    phases = {"while rationales are written": while_sampling(shape, load), "while updating": while_updating(shape, load)}
    lines += ["", f"memory of each device, GiB (an estimate from above, at {load.prompt} + {load.rationale} tokens a text)"]
    lines += _table("always", held)
    for name, rows in phases.items():
        lines += _table(name, rows)
    base = sum(row.bytes for row in held)
    peaks = {name: base + sum(row.bytes for row in rows) for name, rows in phases.items()}
    worst = max(peaks, key=lambda name: peaks[name])
    lines += [f"  {peaks[worst] / _GIB:8.1f}  peak, {worst}; the CUDA context and the allocator take some 2 more"]
    if not load.at_once:
        lines.append(
            f"  vLLM takes rollout.gpu_memory_utilization={cfg.rollout.gpu_memory_utilization} of the device besides while it writes"
        )
    return "\n".join(lines)


def _arithmetic(work: Work) -> list[str]:
    k, m, b = work.rollouts, work.negatives, work.share
    calls = " + ".join(f"{texts} texts x {n}" for texts, n in work.calls())
    sequences = sum(texts * n for texts, n in work.calls())
    groups = sum(texts for texts, n in work.calls() if n == k) // work.updates
    tokens = max(work.tokens, work.prompt + work.rationale)
    return [
        f"ranks        {work.nodes} node(s) x {work.devices} device(s) = {work.ranks}, {work.strategy}",
        f"batch        {work.instances} instances / {work.ranks} ranks = {b} each, with K = {k} rollouts and M = {m} negatives",
        f"rollouts     {calls} = {sequences} sequences a rank, of at most {work.prompt} + {work.rationale} tokens",
        f"rewards      among the texts of all {work.instances} instances",
        f"updates      {work.updates} a batch, each of {groups} groups a rank ({groups * work.ranks} in all), in micro-batches of at most "
        f"{tokens:,} tokens",
    ]


def _table(name: str, rows: list[Row]) -> list[str]:
    lines = [f"  {name}"] + [f"  {row.bytes / _GIB:8.2f}  {row.what:28s} {row.how}" for row in rows]
    return [*lines, f"  {sum(row.bytes for row in rows) / _GIB:8.2f}  together"]
