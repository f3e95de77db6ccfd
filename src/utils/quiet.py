"""MTEB without its commentary: what it says while it works would bury what this project says."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_mteb() -> Iterator[None]:
    """No progress bars of `datasets`, no INFO lines of mteb, no complaints of scikit-learn about MTEB's classifiers.

    Warnings and errors of mteb come through. A classification score is defined by 100 iterations of logistic
    regression, converged or not, and by precision over classes of which some are never predicted.
    """
    import datasets
    from sklearn.exceptions import ConvergenceWarning, UndefinedMetricWarning

    logger = logging.getLogger("mteb")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(max(level, logging.WARNING))
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            for category in (ConvergenceWarning, UndefinedMetricWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
