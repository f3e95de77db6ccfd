"""Libraries without their commentary: what they say while they work would bury what this project says."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_mteb() -> Iterator[None]:
    """No progress bars of `datasets`, no INFO lines of mteb, no complaints of scikit-learn about MTEB's classifiers.

    Other warnings and errors of mteb come through; that a task has a newer version is known to whoever names the older,
    and the failures of tasks are told by who runs them. A classification score is defined by 100 iterations of logistic
    regression, converged or not, and by precision over classes of which some are never predicted.
    """
    import datasets
    from sklearn.exceptions import ConvergenceWarning, UndefinedMetricWarning

    logger = logging.getLogger("mteb")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(max(level, logging.WARNING))
    talkers = [logging.getLogger(name) for name in ("mteb.evaluate", "mteb.abstasks.abstask")]
    for talker in talkers:
        talker.addFilter(_is_news)
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            for category in (ConvergenceWarning, UndefinedMetricWarning):
                warnings.simplefilter("ignore", category)
            warnings.filterwarnings("ignore", message=".* is superseded by .*")
            yield
    finally:
        logger.setLevel(level)
        for talker in talkers:
            talker.removeFilter(_is_news)
        if bars:
            datasets.enable_progress_bars()


def _is_news(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "is superseded by" not in message and not message.startswith("Error while running task")


@contextmanager
def quiet_mlflow() -> Iterator[None]:
    """No progress bar for each small artifact that is read."""
    from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR as BARS

    before = BARS.get_raw()
    BARS.set(False)
    try:
        yield
    finally:
        if before is None:
            BARS.unset()
        else:
            BARS.set(before)


_NEEDLESS_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*does not have many workers.*",  # batches are text, made faster than they are used
    r".*You have overridden `transfer_batch_to_device`.*",
    r".*module\(s\) in eval mode at the start of training.*",  # as transformers loads them
    r".*Your `IterableDataset` has `__len__` defined.*",  # exact, in one process
    r".*Checkpoint directory .* exists and is not empty.*",  # of a run that goes on
    r".*your dataloader is not resumable.*",  # it asks the trainer how far it is, and goes on from there
)


def quiet_lightning() -> None:
    """Leaves out Lightning's warnings about what is meant here, and its advertisements; for the rest of the process."""
    for message in _NEEDLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "Tip: For seamless" not in record.getMessage())
