"""Logs the distance of training from the speed of the card."""

import logging
from collections.abc import Sequence
from statistics import median
from typing import Any

import lightning as L

from src.callbacks.monitoring import MonitoringCallback, as_policy_module, last_report
from src.modules.grace import GRACE
from src.modules.objectives.roles import texts_of
from src.modules.plan.memory import shape_of
from src.modules.plan.speed import Phase, batch_phases, find_card
from src.modules.types import ROLES, Role
from src.records import Triplet

log = logging.getLogger(__name__)


class FloorDistance(MonitoringCallback[GRACE]):
    """Logs, once, how many times the floor of src/modules/plan/speed.py the writing and the update of rationales take.

    Compared is the median of the batches after the first, which compiles, with the lengths of the last of them. Without a known card it
    does nothing.

    Args:
        batches: after which the line is written.
        card: a name of `CARDS`; None: the card of this machine.
    """

    applies_to = GRACE

    def __init__(self, batches: int = 10, card: str | None = None) -> None:
        self.batches, self.card = batches, find_card(card)
        self._seconds: dict[str, list[float]] = {"rollout": [], "update": []}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        module = as_policy_module(pl_module)
        if self.card is None or not isinstance(module, GRACE) or len(self._seconds["rollout"]) == self.batches:
            return
        seconds = last_report(module).seconds
        for phase, taken in self._seconds.items():
            taken.append(seconds.get(phase, 0.0))
        if len(self._seconds["rollout"]) == self.batches:
            self._write_line(module, batch, trainer.precision != "32-true")

    def _write_line(self, module: GRACE, batch: Sequence[Triplet], half: bool) -> None:
        floor = {"rollout": 0.0, "update": 0.0}
        for phase in phases_of(module, batch, half):
            floor["update" if phase.what == "updating" else "rollout"] += phase.seconds(self.card, half) if self.card else 0.0
        said = []
        for name, taken in self._seconds.items():
            found = median(taken[1:] or taken)
            said.append(f"{name} {found:.2f} s, {found / floor[name]:.1f} times")
        log.info("after %d batches: %s the floor of a %s", self.batches, "; ".join(said), self.card.name if self.card else "")


def phases_of(module: GRACE, batch: Sequence[Triplet], half: bool) -> list[Phase]:
    """Returns the phases of a batch on one device, without that of a reference, with the rationales at their mean length."""
    h, ranks, report = module.hparams, module.ranks, last_report(module)
    learned: tuple[Role, ...] = ("positive", *h["also_learn_from"])
    lengths = {role: module.renderer(texts).lengths.tolist() if (texts := texts_of(batch, role)) else [] for role in ROLES}
    many = [length for role in learned for length in lengths[role]]
    few = [length for role in ROLES if role not in learned for length in lengths[role]]
    k, mean = h["num_generations"], report.rollout_tokens / (len(many) * h["num_generations"] + len(few))
    updates = round(report.update.get("updates", 1))
    sizes = (many[:: ranks.count], k, few[:: ranks.count], mean, half)
    return batch_phases(shape_of(module.policy.model.config), *sizes, updates=updates, pathwise=h["pathwise_weight"] > 0)
