"""Dynamic sampling (DAPO, Yu et al., arXiv 2503.14476, section 3.2): updates learn from groups whose rewards differ."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from src.modules.distributed.ranks import ALONE, Ranks
from src.modules.training.experience import Experience, concatenate
from src.modules.types import Rollouts


def informative(rewards: Tensor, keep: Tensor, min_std: float) -> Tensor:
    """[B] bool: the groups whose kept rewards have a (population) standard deviation of at least `min_std`.

    DAPO's rewards are 1 or -1, and it leaves out groups in which all rollouts earned the same: their advantages are 0. Here
    rewards are continuous and never quite the same. What is left out are groups whose rollouts differ by less than
    `min_std`: nearly equal rationales, whose order is decided by rounding and by little else, and which a division by the
    group's deviation would blow up to the size of all others. A group that keeps fewer than two rollouts has a deviation of 0.

    Args:
        rewards, keep: [B, K] float32, as the advantage sees them, and bool.
        min_std: on the scale of the rewards; 0 leaves nothing out.
    """
    counts = keep.sum(dim=1).clamp(min=1)
    mean = (rewards * keep).sum(dim=1) / counts
    variance = ((rewards - mean.unsqueeze(1)).square() * keep).sum(dim=1) / counts
    return variance.sqrt() >= min_std


class GroupBuffer:
    """Gathers informative groups over rollout batches, all of one and the same policy, until they make an update.

    An update is due once there are as many as a rollout batch has, or after `max_extra_batches` rollout batches more than
    one, with what is there; what the last batch has beyond that is dropped, as the policy has moved on when the next update is
    due. The policy stands still meanwhile, so nothing gathered is off-policy.

    Args:
        min_std: see `informative`.
        max_extra_batches: most further rollout batches for one update; 0 learns from what the first one left.
    """

    def __init__(self, min_std: float = 0.0, max_extra_batches: int = 0) -> None:
        self.min_std, self.max_extra_batches = min_std, max_extra_batches
        self.held: list[Experience] = []
        self.batches = 0

    def add(self, experience: Experience, rewards: Tensor, ranks: Ranks = ALONE) -> Experience | None:
        """Takes in a rollout batch of B groups with their rewards, [B, K]; gives back what an update is to learn from.

        Each rank holds its own groups; whether there are enough is decided by those of all.

        Returns:
            None while more is to be sampled, or where even the last batch brought this rank nothing to learn from.
        """
        groups = len(experience)
        held, wanted = ranks.total(sum(len(part) for part in self.held), groups)
        worth = informative(rewards, experience.keep, self.min_std)
        worth = worth & ranks.own(ranks.gather(worth, groups).cumsum(0) <= wanted - held, groups)
        if worth.all():
            self.held.append(experience)
        elif worth.any():
            self.held.append(experience.select(worth.nonzero().flatten()))
        self.batches += 1
        held = ranks.total(sum(len(part) for part in self.held))[0]
        if held < wanted and self.batches <= self.max_extra_batches:
            return None
        ready = [part.to(experience.keep.device) for part in self.held]
        self.held, self.batches = [], 0
        return concatenate(ready) if ready else None

    def state_dict(self) -> dict[str, Any]:
        """What is held, as plain containers of tensors: a run that is stopped loses nothing of it."""
        unused = {"embeddings": None, "prefix_embeddings": None, "prompt_embeddings": None}
        held = [vars(part) | {"rollouts": vars(part.rollouts) | unused} for part in self.held]
        return {"held": held, "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held = [Experience(**{**part, "rollouts": Rollouts(**part["rollouts"])}) for part in state["held"]]
        self.batches = state["batches"]


def shared_out(states: Sequence[dict[str, Any]], ranks: Ranks) -> dict[str, Any]:
    """What a rank goes on with of the states that ranks held: its own, or where they were more or fewer than now, a part of all."""
    if len(states) == ranks.count:
        return states[ranks.rank]
    parts = [part for state in states for part in state["held"]]
    return {"held": parts[ranks.rank :: ranks.count], "batches": states[0]["batches"]}
