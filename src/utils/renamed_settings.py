"""Settings that were renamed."""

RENAMED = {
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
    "reward.document_weight": "reward.to_query_weight",
    "reward.query_weight": "reward.to_document_weight",
    "datamodule.groups": "datamodule.modules_per_batch",
    "datamodule.per_group": "datamodule.docstrings_per_module",
}
"""Old dotted name -> new dotted name."""
