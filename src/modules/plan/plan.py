"""Plans a run from its config alone: `python train.py ... dry_run=true`. No weights are read."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from src.modules.plan.memory import Row, Shape, Work, always, find_config, shape_of, while_sampling, while_updating
from src.modules.plan.speed import CARDS, batch_phases, find_card
from src.modules.rollouts.hf import MOST_TOKENS

_GIB = 2**30


class PlanError(ValueError):
    """Settings do not fit together."""


def plan(cfg: DictConfig) -> tuple[Work, Shape]:
    """Returns how a config's rollout batch is shared out, and the shape of its model.

    Raises:
        PlanError: numbers that do not divide, or a config of something else than GRACE training.
        FileNotFoundError: no config of the model.
    """
    if OmegaConf.select(cfg, "module.algorithm") is None or OmegaConf.select(cfg, "policy.path", default=None) is None:
        raise PlanError("dry_run plans GRACE training (module=grace) from a policy.path, and this config is of something else")
    work, policy, lora = _work(cfg), cfg.policy, cfg.policy.lora
    _check(work)
    config = find_config(policy.path, Path(cfg.paths.root, "configs", "shapes", "published.yaml"), policy.trust_remote_code)
    return work, shape_of(config, policy.train_embeddings, None if lora is None else instantiate(lora))


def _work(cfg: DictConfig) -> Work:
    data, prompt, rationale = cfg.datamodule, cfg.module.max_prompt_tokens, cfg.rollout.max_new_tokens
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
        prompt=prompt,
        rationale=rationale,
        tokens=max(cfg.module.micro_batch_tokens, prompt + rationale),
        engine_tokens=(cfg.rollout.batch_tokens or MOST_TOKENS) if "batch_tokens" in cfg.rollout else 0,
        half=str(cfg.trainer.precision) in ("bf16", "bf16-mixed"),
        token_credit=cfg.algorithm.gae_lambda is not None,
        checkpointing=cfg.policy.gradient_checkpointing,
        reference=cfg.algorithm.kl_coef > 0,
        pathwise=cfg.module.pathwise_weight > 0 or cfg.module.distill_weight > 0,
        gathered=2 if OmegaConf.select(cfg, "trainer.strategy.gather_dtype", default=None) == "bfloat16" else 4,
        copies=int(cfg.algorithm.kl_coef > 0 and cfg.policy.lora is None) + int(cfg.policy.encoder == "frozen"),
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
    """Prints the plan; raises what `plan` raises."""
    Console(width=150, highlight=False, markup=False).print(text(cfg), soft_wrap=True)


def text(cfg: DictConfig) -> str:
    """Returns the plan as lines; raises what `plan` raises."""
    work, shape = plan(cfg)
    k, m, b, calls = work.rollouts, work.negatives, work.share, work.calls()
    asked, sequences = " + ".join(f"{texts} texts x {n}" for texts, n in calls), sum(texts * n for texts, n in calls)
    groups = sum(texts for texts, n in calls if n == k) // work.updates
    base = always(shape, work)
    phases = {"while rationales are written": while_sampling(shape, work), "while updating": while_updating(shape, work)}
    worst = max(phases, key=lambda name: _sum(phases[name]))
    lines = [
        f"dry run of {cfg.name} with {cfg.policy.path}: {shape.parameters:,} parameters, {shape.trained:,} of them trained",
        "",
        f"ranks        {work.nodes} node(s) x {work.devices} device(s) = {work.ranks}, {work.strategy}",
        f"batch        {work.instances} instances / {work.ranks} ranks = {b} each, with K = {k} rollouts and M = {m} negatives",
        f"rollouts     {asked} = {sequences} sequences a rank, of at most {work.prompt} + {work.rationale} tokens",
        f"rewards      among the texts of all {work.instances} instances",
        f"updates      {work.updates} a batch, each of {groups} groups a rank ({groups * work.ranks} in all), in micro-batches of at most "
        f"{work.tokens:,} tokens",
        "",
        f"memory of each device, GiB (an estimate from above, at {work.prompt} + {work.rationale} tokens a text)",
    ]
    for name, rows in {"always": base, **phases}.items():
        lines += [f"  {name}", *(f"  {row.bytes / _GIB:8.2f}  {row.what:28s} {row.arithmetic}" for row in rows)]
        lines += [f"  {_sum(rows) / _GIB:8.2f}  together"]
    peak = (_sum(base) + _sum(phases[worst])) / _GIB
    lines += [f"  {peak:8.1f}  peak, {worst}; the CUDA context and the allocator take some 2 more"]
    if not work.engine_tokens:
        share = cfg.rollout.gpu_memory_utilization
        lines += [f"  vLLM takes rollout.gpu_memory_utilization={share} of the device in addition while it writes"]
    return "\n".join([*lines, "", *_time(cfg, work, shape)])


def _time(cfg: DictConfig, work: Work, shape: Shape) -> list[str]:
    """Returns the floor of a batch's time on the card, and of the run's."""
    try:
        card = find_card(OmegaConf.select(cfg, "plan.card", default=None))
    except ValueError as error:
        raise PlanError(str(error)) from error
    if card is None:
        return [f"time of a rollout batch: not known for this machine; plan.card names a card to plan for ({', '.join(CARDS)})"]
    prompts, context = ([work.prompt] * sum(texts for texts, n in work.calls() if (n == work.rollouts) == many) for many in (True, False))
    lengths = (prompts, work.rollouts, context, work.rationale, work.half)
    phases = batch_phases(
        shape, *lengths, updates=work.updates, checkpointing=work.checkpointing, reference=work.reference, pathwise=work.pathwise
    )
    seconds = [phase.seconds(card, work.half) for phase in phases]
    lines = [
        f"time of a rollout batch on each {card.name}, seconds (a floor: all arithmetic and reading at the card's full rates, at "
        f"{work.prompt} + {work.rationale} tokens a text)"
    ]
    for phase, taken in zip(phases, seconds, strict=True):
        lines += [f"  {taken:8.2f}  {phase.what:28s} {phase.flops / 1e12:,.1f} TFLOP, {phase.bytes / 1e9:,.0f} GB"]
    known = _batches(cfg, work)
    batches = f"{known:,} batches (fewer if the data ends first)" if known else "1,000 batches (an example: the data decides)"
    hours = f"{batches} take at least {(known or 1000) * sum(seconds) / 3600:,.2f} hours, without evaluation"
    return [*lines, f"  {sum(seconds):8.2f}  together; {hours}"]


def _batches(cfg: DictConfig, work: Work) -> int | None:
    """Returns the most rollout batches of the run, by its limits; None without any."""
    steps, of_an_epoch = cfg.trainer.max_steps, cfg.trainer.limit_train_batches
    limits = [-(-steps // work.updates)] if steps > 0 else []
    if isinstance(of_an_epoch, int) and cfg.trainer.max_epochs:
        limits.append(of_an_epoch * cfg.trainer.max_epochs)
    return min(limits, default=None)


def _sum(rows: list[Row]) -> float:
    return sum(row.bytes for row in rows)
