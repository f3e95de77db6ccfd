"""Filters for messages of libraries that would bury those of this project."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_EXPECTED_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*does not have many workers.*",  # batches are text, made faster than they are used
    r".*You have overridden `transfer_batch_to_device`.*",
    r".*module\(s\) in eval mode at the start of training.*",  # as transformers loads them
    r".*Your `IterableDataset` has `__len__` defined.*",  # exact, in one process
    r".*Checkpoint directory .* exists and is not empty.*",  # of a resumed run
    r".*your dataloader is not resumable.*",  # it reads its position from the trainer
)


def quiet_lightning() -> None:
    """Hides Lightning's warnings about what is intended here, and its advertisements, for the rest of the process."""
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "Tip: For seamless" not in record.getMessage())


@contextmanager
def quiet_mteb() -> Iterator[None]:
    """Hides progress bars of `datasets`, INFO lines of mteb and scikit-learn's warnings about MTEB's classifiers.

    MTEB defines a classification score by 100 iterations of logistic regression, converged or not, and by precision over classes
    that may never be predicted. Newer versions of tasks are hidden too, as are failures, which the caller reports.
    """
    import datasets
    from sklearn.exceptions import ConvergenceWarning, UndefinedMetricWarning

    logger = logging.getLogger("mteb")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(max(level, logging.WARNING))
    filtered = [logging.getLogger(name) for name in ("mteb.evaluate", "mteb.abstasks.abstask")]
    for other in filtered:
        other.addFilter(_is_news)
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            for category in (ConvergenceWarning, UndefinedMetricWarning):
                warnings.simplefilter("ignore", category)
            warnings.filterwarnings("ignore", message=".* is superseded by .*")
            yield
    finally:
        logger.setLevel(level)
        for other in filtered:
            other.removeFilter(_is_news)
        if bars:
            datasets.enable_progress_bars()


def _is_news(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "is superseded by" not in message and not message.startswith("Error while running task")


@contextmanager
def quiet_mlflow() -> Iterator[None]:
    """Hides the progress bar of each artifact that is read."""
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
