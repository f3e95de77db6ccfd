"""What several callbacks share: the records they watch, and how they look at a policy without disturbing its training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn.functional import normalize

from src.modules.distributed.fsdp import whole
from src.modules.grace import GRACE
from src.modules.objectives.rewards import Embeddings
from src.modules.objectives.roles import texts_of
from src.modules.policy.model import evaluation_mode
from src.modules.policy_module import PolicyModule
from src.modules.training.scoring import encode_others, negatives_an_instance
from src.modules.types import Rollouts
from src.records import Triplet


@contextmanager
def undisturbed(module: PolicyModule) -> Iterator[None]:
    """No gradients, the policy in eval mode and whole, and afterwards every random state and mode as it was before.

    Every rank looks on, as a policy may be cut over them; rank zero alone tells of it.
    """
    with isolate_rng(), evaluation_mode(module.policy), whole(module.policy):
        yield


@contextmanager
def in_training_arithmetic(trainer: L.Trainer) -> Iterator[None]:
    """Computes as the trainer does: in bfloat16 under trainer.precision=bf16-mixed."""
    with trainer.precision_plugin.forward_context():
        yield


def fixed_triplets(trainer: L.Trainer, count: int) -> list[Triplet]:
    """Records that nothing is trained on, the same at every call: `trainer.datamodule.fixed_triplets(count)`.

    Raises:
        ValueError: the datamodule has no such method, or gives no record.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]  # set by fit(datamodule=...)
    found = datamodule.fixed_triplets(count) if hasattr(datamodule, "fixed_triplets") else []
    if not found:
        raise ValueError(
            f"the datamodule ({type(datamodule).__name__}) gives nothing fixed to watch: give it a method fixed_triplets(count), or switch "
            "off what watches (callbacks.rationale_table=null callbacks.similarities=null callbacks.starting_policy_kl=null)"
        )
    return list(found)


def fixed_texts(trainer: L.Trainer, count: int) -> list[str]:
    """The documents of `fixed_triplets`."""
    return texts_of(fixed_triplets(trainer, count), "positive")


def sample(module: PolicyModule, texts: list[str], temperature: float, seed: int = 0, n: int = 1) -> Rollouts:
    """n rationales for each text from the policy as it is now, through the same renderer and engine as in training."""
    return module.engine.generate(module.policy, module.renderer(texts), n=n, temperature=temperature, seed=seed)


def unit_vectors(module: GRACE, rollouts: Rollouts) -> Tensor:
    """[N, D] float32 embeddings of length one."""
    return normalize(encode_others(module.policy, rollouts, module.hparams["encode_batch_size"]), dim=-1)


def embed_sides(module: GRACE, triplets: Sequence[Triplet], n: int, seed: int = 0) -> Embeddings:
    """Embeddings of a batch as training meets them: n rollouts of a positive, one of the others, at its temperatures."""
    b, m = len(triplets), negatives_an_instance(triplets)
    positive = sample(module, texts_of(triplets, "positive"), module.hparams["temperature"], seed, n)
    texts = texts_of(triplets, "query") + texts_of(triplets, "negative")
    others = unit_vectors(module, sample(module, texts, module.hparams["context_temperature"], seed + 1))
    return Embeddings(others[:b], unit_vectors(module, positive).unflatten(0, (b, n)), others[b:].unflatten(0, (b, m)))


def start_embeddings(trainer: L.Trainer, module: PolicyModule, folder: str | None) -> Path | None:
    """Where the embeddings of the policy as it is are kept: in `folder` while it is the starting policy, which other runs begin with
    too, and else nowhere. Nor with several processes: one that finds a text there would not take part in what others do for it."""
    return Path(folder) if folder and module.rollout_batches == 0 and trainer.world_size == 1 else None


def is_due(module: PolicyModule, every_n_rollout_batches: int) -> bool:
    """Whether a callback that acts every n rollout batches acts after the one just done."""
    return every_n_rollout_batches > 0 and module.rollout_batches % every_n_rollout_batches == 0
