"""Settings that were renamed: a line that names the new one, in place of Hydra's error or of a setting that has no effect."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

RENAMED: dict[str, str] = {
    "module.num_rollouts": "module.num_generations",
    "module.positive_temperature": "module.temperature",
    "module.other_temperature": "module.context_temperature",
    "module.max_gradient_norm": "module.max_grad_norm",
    "module.pathwise_sides": "module.pathwise_roles",
    "module.gradient_parts_every": "module.gradient_parts_every_n_rollout_batches",
    "algorithm.kl_weight": "algorithm.kl_coef",
    "algorithm.credit_decay": "algorithm.gae_lambda",
    "algorithm.importance_cap": "algorithm.tis_cap",
    "algorithm.importance_level": "algorithm.tis_level",
    "reward.token_cost": "algorithm.token_cost",
    "reward.document_weight": "reward.to_query_weight",
    "reward.query_weight": "reward.to_document_weight",
    "reward.hard": "reward.hard_reduction",
    "module.pathwise_reward.document_weight": "module.pathwise_reward.to_query_weight",
    "module.pathwise_reward.query_weight": "module.pathwise_reward.to_document_weight",
    "module.pathwise_reward.hard": "module.pathwise_reward.hard_reduction",
    "datamodule.groups": "datamodule.modules_per_batch",
    "datamodule.per_group": "datamodule.docstrings_per_module",
    "datamodule.reader.field": "datamodule.columns.text",
    "callbacks.reward_diagnostics": "callbacks.metrics",
    "callbacks.contrastive_diagnostics": "callbacks.metrics",
    "callbacks.throughput": "callbacks.metrics",
    "callbacks.general_abilities": "callbacks.abilities",
    "module.encode_batch_size": "module.micro_batch_tokens",
    "callbacks.starting_policy_kl.batch_size": "module.micro_batch_tokens",
    "batch_size": "batch_tokens",
    "experiment=cold_start": "python -m experiments.tiny_policy.train",
    "callbacks=contrastive": "callbacks=default",
    "callbacks=contrastive_minimal": "callbacks=minimal",
    "callbacks=smollm2_contrastive": "callbacks=smollm2",
    "callbacks=smollm2_study_contrastive": "callbacks=smollm2_study",
}
"""Old name to new one: a setting in full, or the option of a group as `group=option`."""


def check_arguments(arguments: Sequence[str]) -> None:
    """Checks a command line, `sys.argv`, before Hydra composes its config.

    Raises:
        SystemExit: an override uses an old name; the message gives the new one.
    """
    for argument in arguments[1:]:
        key, _, value = argument.partition("=")
        key = key.lstrip("+~")
        for name in (key, *(f"{key}={option}" for option in value.split(","))):
            _require_current(name, Path(arguments[0]).name)


def check_config(cfg: DictConfig, program: str) -> None:
    """Checks a composed config, into which an experiment file may have merged an old name.

    Raises:
        SystemExit: as in `check_arguments`.
    """
    for name in RENAMED:
        parent, _, key = name.rpartition(".")
        node = OmegaConf.select(cfg, parent, throw_on_missing=False) if parent else cfg
        if isinstance(node, DictConfig) and key in node:
            _require_current(name, program)


def _require_current(name: str, program: str) -> None:
    for old, new in RENAMED.items():
        if name == old or name.startswith(f"{old}."):  # and what is set within it
            raise SystemExit(f"{program}: {old} is called {new} now")
