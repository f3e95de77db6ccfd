"""Validates the settings of GRACE."""

from collections.abc import Mapping
from typing import Any

from src.modules.objectives.algorithm import Algorithm
from src.modules.objectives.distillation import LOSSES
from src.modules.types import CONTEXT_ROLES, ROLES


def check_settings(h: Mapping[str, Any], frozen_encoder: bool, algorithm: Algorithm) -> None:
    """Raises ValueError for a setting out of range, or for settings that exclude each other; see GRACE."""
    if h["num_generations"] < 2:
        raise ValueError(f"module.num_generations={h['num_generations']}: a group of one rollout has no baseline; use 2 or more")
    if h["temperature"] <= 0 or h["context_temperature"] < 0:
        raise ValueError(
            f"module.temperature={h['temperature']}, module.context_temperature={h['context_temperature']}: the first must be above 0, as "
            "greedy rollouts do not differ; the second may be 0 (greedy)"
        )
    _require_roles("also_learn_from", h["also_learn_from"], CONTEXT_ROLES)
    _require_roles("pathwise_roles", h["pathwise_roles"], ROLES)
    for name, least in (("micro_batch_tokens", 1), ("gradient_parts_every_n_rollout_batches", 0)):
        if h[name] < least:
            raise ValueError(f"module.{name}={h[name]}: it must be at least {least}")
    score_function, pathwise = h["score_function_weight"], h["pathwise_weight"]
    if not (score_function >= 0 and pathwise >= 0):  # nor nan
        raise ValueError(
            f"module.score_function_weight={score_function}, module.pathwise_weight={pathwise}: both must be at least 0, as a negative "
            "weight would train against the reward"
        )
    if not (score_function or pathwise or h["distill_weight"]):
        raise ValueError("module.score_function_weight=0 and module.pathwise_weight=0: nothing would be learned; set one above 0")
    for name in ("kl_coef", "entropy_coef", "token_cost"):
        if not score_function and (value := getattr(algorithm, name)):
            raise ValueError(
                f"module.score_function_weight=0 leaves out the algorithm's loss, and algorithm.{name}={value} with it, which then has no "
                f"effect: use a small weight in place of 0, or algorithm.{name}=0"
            )
    if h["distill_loss"] not in LOSSES:
        raise ValueError(f"module.distill_loss={h['distill_loss']!r}: it is {' or '.join(LOSSES)}")
    if not h["distill_weight"] >= 0:
        raise ValueError(f"module.distill_weight={h['distill_weight']}: it must be at least 0")
    if algorithm.term_advantage is not None and h["also_learn_from"]:
        raise ValueError(
            f"module.also_learn_from={list(h['also_learn_from'])}: queries and negatives are rewarded by totals, which "
            "algorithm.term_advantage takes apart; set one of the two to [] or null"
        )
    group = h["max_prompt_tokens"] + h["num_generations"] * h["max_new_tokens"]
    if algorithm.kl_coef and algorithm.kl_in == "pairs" and h["micro_batch_tokens"] < group:
        raise ValueError(
            f"module.micro_batch_tokens={h['micro_batch_tokens']}: algorithm.kl_in=pairs compares all rollouts of a text in one pass, "
            f"which may take {group} tokens (max_prompt_tokens + num_generations * max_new_tokens)"
        )
    if pathwise and not h["pathwise_roles"]:
        raise ValueError(
            f"module.pathwise_roles=[] and module.pathwise_weight={pathwise}: no embedding would be moved; set the weight to 0"
        )
    for name in ("pathwise_weight", "distill_weight"):
        if h[name]:
            _check_moved_embeddings(f"module.{name}={h[name]}", frozen_encoder, algorithm)


def _require_roles(setting: str, roles: tuple[str, ...], known: tuple[str, ...]) -> None:
    if unknown := set(roles) - set(known):
        raise ValueError(f"module.{setting}={list(roles)}: {', '.join(sorted(unknown))} is not one of {', '.join(known)}")


def _check_moved_embeddings(weight: str, frozen_encoder: bool, algorithm: Algorithm) -> None:
    if frozen_encoder:
        raise ValueError(f"{weight} moves the encoder, and policy.encoder=frozen holds it: use policy.encoder=live, or weight 0")
    if algorithm.min_group_std > 0:
        raise ValueError(
            f"{weight} takes part in every rollout batch, and algorithm.min_group_std={algorithm.min_group_std} leaves groups out and "
            "waits for others: set one of the two to 0"
        )
