"""Validates the settings of GRACE."""

from collections.abc import Mapping
from typing import Any

from src.modules.objectives.algorithm import Algorithm
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
    if not score_function and not pathwise:
        raise ValueError("module.score_function_weight=0 and module.pathwise_weight=0: nothing would be learned; set one above 0")
    if not score_function and algorithm.kl_coef:
        raise ValueError(
            f"module.score_function_weight=0 leaves out the algorithm's loss, and algorithm.kl_coef={algorithm.kl_coef} with it: nothing "
            "would hold the policy near its start; use a small weight in place of 0"
        )
    if pathwise:
        _check_pathwise(h, frozen_encoder, algorithm)


def _require_roles(setting: str, roles: tuple[str, ...], known: tuple[str, ...]) -> None:
    if unknown := set(roles) - set(known):
        raise ValueError(f"module.{setting}={list(roles)}: {', '.join(sorted(unknown))} is not one of {', '.join(known)}")


def _check_pathwise(h: Mapping[str, Any], frozen_encoder: bool, algorithm: Algorithm) -> None:
    weight = f"module.pathwise_weight={h['pathwise_weight']}"
    if not h["pathwise_roles"]:
        raise ValueError(f"module.pathwise_roles=[] and {weight}: no embedding would be moved; set the weight to 0")
    if frozen_encoder:
        raise ValueError(f"{weight} moves the encoder, and policy.encoder=frozen holds it: use policy.encoder=live, or weight 0")
    if algorithm.min_group_std > 0:
        raise ValueError(
            f"{weight} takes part in every rollout batch, and algorithm.min_group_std={algorithm.min_group_std} leaves groups out and "
            "waits for others: set one of the two to 0"
        )
