"""train.py for sweeps, with arithmetic in place of training: the same configs, callback, logger and `run_point`.

Environment: the point at which it fails (FAIL_AT, FAIL_EARLY) or is killed (KILL_AT), and the file of computed points (RAN).
"""

import os
import signal
from pathlib import Path

os.environ.setdefault("PROJECT_ROOT", str(Path(__file__).resolve().parents[2]))

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from src.utils.sweeps import run_point


def compute(cfg: DictConfig) -> float:
    """Returns a score that is highest at consistency_weight 0.2 and hard_weight 0.1, and differs by seed."""
    a, b = cfg.reward.consistency_weight, cfg.reward.hard_weight
    point = f"{a} {b} {cfg.seed}"
    if point == os.environ.get("FAIL_EARLY"):
        raise ValueError("failed before there was a run")
    OmegaConf.resolve(cfg.policy)  # as Hydra's instantiate does for what a module refers to
    logger = instantiate(cfg.logger)
    logger.log_hyperparams({"seed": cfg.seed})
    if point == os.environ.get("KILL_AT"):
        os.kill(os.getpid(), signal.SIGKILL)
    if point == os.environ.get("FAIL_AT"):
        raise ValueError(f"no such point: {point}")
    score = 1 - abs(a - 0.2) - abs(b - 0.1) + 0.01 * cfg.seed
    for step in (1, 2):
        logger.log_metrics({"mteb/average": score * step / 2, "rollout/unrelated_similarity": b}, step=step)
    logger.finalize("success")
    with Path(os.environ["RAN"]).open("a", encoding="utf-8") as ran:
        ran.write(f"{point}\n")
    return score


@hydra.main(version_base="1.3", config_path="../../configs", config_name="train")
def main(cfg: DictConfig) -> float | None:
    return run_point(cfg, compute)


if __name__ == "__main__":
    main()
