"""Dynamic sampling (DAPO, Yu et al., arXiv 2503.14476, section 3.2): updates learn from groups whose rewards differ."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from src.modules.distributed.ranks import ALONE, Ranks
from src.modules.training.experience import Experience, concatenate
from src.modules.types import Rollouts


def informative(rewards: Tensor, keep: Tensor, min_std: float) -> Tensor:
    """Returns [B] bool: the groups whose kept rewards have a (population) standard deviation of at least `min_std`.

    DAPO's rewards are 1 or -1, and it leaves out groups in which all rewards are equal. Here rewards are continuous and hardly ever equal;
    groups are left out whose rewards differ by less than `min_std`: their order is decided by rounding, and a division by the group's
    deviation would scale it up. A group that keeps fewer than two rollouts has a deviation of 0.

    Args:
        rewards, keep: [B, K] float32, shaped, and bool.
        min_std: on the scale of the rewards; 0 leaves none out.
    """
    counts = keep.sum(dim=1).clamp(min=1)
    mean = (rewards * keep).sum(dim=1) / counts
    variance = ((rewards - mean.unsqueeze(1)).square() * keep).sum(dim=1) / counts
    return variance.sqrt() >= min_std


class GroupBuffer:
    """Holds informative groups over several rollout batches of one policy, until they are enough for an update.

    An update is due once there are as many groups as one rollout batch has, or after `max_extra_batches` batches more than one, with what
    is there. Surplus groups of the last batch are dropped, as they would be off-policy at the next update.

    Args:
        min_std: see `informative`; 0 passes every batch on.
        max_extra_batches: most further rollout batches for one update.
    """

    def __init__(self, min_std: float = 0.0, max_extra_batches: int = 0) -> None:
        self.min_std, self.max_extra_batches = min_std, max_extra_batches
        self.held: list[Experience] = []
        self.batches = 0

    def add(self, experience: Experience, rewards: Tensor, ranks: Ranks = ALONE) -> Experience | None:
        """Takes in this rank's groups of a rollout batch with their shaped rewards, [B, K]; returns what an update is to learn from.

        Returns:
            None while more groups are needed, or if this rank has none even after the last batch.
        """
        if self.min_std <= 0:
            return experience
        groups = len(experience)
        held, wanted = ranks.total(sum(len(part) for part in self.held), groups)
        worth = informative(rewards, experience.keep, self.min_std)
        worth = worth & ranks.own(ranks.gather(worth, groups).cumsum(0) <= wanted - held, groups)
        if worth.any():
            self.held.append(experience.select(worth.nonzero().flatten()))
        self.batches += 1
        held = ranks.total(sum(len(part) for part in self.held))[0]
        if held < wanted and self.batches <= self.max_extra_batches:
            return None
        ready = [part.to(experience.keep.device) for part in self.held]
        self.held, self.batches = [], 0
        return concatenate(ready) if ready else None

    def state_dict(self) -> dict[str, Any]:
        """Returns what is held, as plain containers of tensors."""
        return {"held": [vars(part) | {"rollouts": vars(part.rollouts)} for part in self.held], "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what is held, unless dynamic sampling has been switched off: nothing would take it out again."""
        if self.min_std <= 0:
            return
        self.held = [Experience(**{**part, "rollouts": rollouts_of(part["rollouts"])}) for part in state["held"]]
        self.batches = state["batches"]


def rollouts_of(saved: dict[str, Any]) -> Rollouts:
    """Reads rollouts from a checkpoint; those of earlier versions call `text_starts` prefix_lengths."""
    return Rollouts(**{"text_starts" if name == "prefix_lengths" else name: value for name, value in saved.items()})


def shared_out(states: Sequence[dict[str, Any]], ranks: Ranks) -> dict[str, Any]:
    """Returns the state that this rank goes on with: its own, or a part of all if the number of ranks has changed."""
    if len(states) == ranks.count:
        return states[ranks.rank]
    parts = [part for state in states for part in state["held"]]
    return {"held": parts[ranks.rank :: ranks.count], "batches": states[0]["batches"]}
