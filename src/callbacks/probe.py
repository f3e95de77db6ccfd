"""What several callbacks share: the texts they watch, and how they look at a policy without disturbing its training."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng

from src.modules.encoder import evaluation_mode
from src.modules.grace import GRACE
from src.modules.prompt import PromptRenderer
from src.modules.sequences import Rollouts
from src.modules.sharding import whole


@contextmanager
def undisturbed(module: GRACE) -> Iterator[None]:
    """No gradients, the policy in eval mode and whole, and afterwards every random state and mode as it was before.

    Every rank looks on, as a policy may be cut over them; rank zero alone tells of it.
    """
    with isolate_rng(), evaluation_mode(module.policy), whole(module.policy):
        yield


def fixed_texts(trainer: L.Trainer, count: int) -> list[str]:
    """Documents that nothing is trained on, the same at every call: `trainer.datamodule.fixed_texts(count)`.

    Raises:
        ValueError: the datamodule has no such method, or gives no text.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]  # set by fit(datamodule=...)
    texts = datamodule.fixed_texts(count) if hasattr(datamodule, "fixed_texts") else []
    if not texts:
        raise ValueError(
            f"the datamodule ({type(datamodule).__name__}) gives no fixed texts to watch: give it a method fixed_texts(count), or switch "
            "off what watches them (callbacks.rationale_table=null callbacks.starting_policy_kl=null)"
        )
    return list(texts)


def sample(module: GRACE, texts: list[str], temperature: float, seed: int = 0) -> Rollouts:
    """One rationale for each text from the policy as it is now, through the same renderer and engine as in training."""
    s = module.settings
    renderer = PromptRenderer(module.policy.tokenizer, s.instruction, s.max_prompt_tokens, s.template_kwargs)
    return module.engine.generate(module.policy, renderer(texts), n=1, temperature=temperature, seed=seed)


def is_due(module: GRACE, every_n_rollout_batches: int) -> bool:
    """Whether a callback that acts every n rollout batches acts after the one just done."""
    return every_n_rollout_batches > 0 and module.rollout_batches % every_n_rollout_batches == 0
