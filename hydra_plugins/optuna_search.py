"""A Hydra sweeper for Optuna 5: `hydra/sweeper=optuna`, see configs/hydra/sweeper/optuna.yaml.

Hydra searches plugins in the namespace package `hydra_plugins` only. Its hydra-optuna-sweeper needs an Optuna below 3.
"""

import math
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Direction = Literal["maximize", "minimize"]


def distribution(override: Override) -> "BaseDistribution":
    """Returns Optuna's distribution for a swept key.

    `interval(a, b)` is a range of floats, `int(interval(a, b))` of integers, both logarithmic in `tag(log, ...)`; `a,b`,
    `choice(...)`, `range(...)` and `glob(...)` are categories.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if not isinstance(value, IntervalSweep):
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    assert value.start is not None
    assert value.end is not None
    logarithmic = "log" in value.tags
    if isinstance(value.start, int) and isinstance(value.end, int):
        return IntDistribution(value.start, value.end, log=logarithmic)
    return FloatDistribution(value.start, value.end, log=logarithmic)


class OptunaSearch(Sweeper):
    """Asks Optuna for points, has the launcher run them, and tells Optuna their results.

    The study is in memory. A resumed search proposes the same points again, as the sampler is seeded, and finished points return
    their results at once (src/utils/sweeps.py). A failed point returns nan.

    Args:
        sampler: config of an Optuna sampler, with a seed.
        direction: `maximize` or `minimize`.
        n_trials: number of points.
        n_jobs: points per call of the launcher, which may run them in parallel.
        params: swept keys and their values; the command line wins.
    """

    def __init__(self, sampler: DictConfig, direction: Direction, n_trials: int, n_jobs: int, params: DictConfig | None) -> None:
        self.sampler, self.direction, self.n_trials, self.n_jobs = sampler, direction, n_trials, n_jobs
        self.params: dict[str, str] = {str(key): str(value) for key, value in (params or {}).items()}
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        """Runs the search with the overrides of the command line; returns the trials' values.

        Raises:
            SystemExit: Optuna is not installed, or there is no `optimized_metric`.
        """
        assert self.config is not None
        assert self.hydra_context is not None
        assert self.launcher is not None
        if self.config.get("optimized_metric") is None:
            raise SystemExit("hydra/sweeper=optuna needs something to optimise: optimized_metric=mteb/average")
        try:
            import optuna
        except ModuleNotFoundError as error:
            raise SystemExit("hydra/sweeper=optuna needs Optuna: pip install -e '.[sweeps]'") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        given = [f"{key}={value}" for key, value in self.params.items()] + arguments
        overrides = {o.get_key_element(): o for o in OverridesParser.create(self.hydra_context.config_loader).parse_overrides(given)}
        space = {key: distribution(override) for key, override in overrides.items() if override.is_sweep_override()}
        fixed = [f"{key}={o.get_value_element_as_str()}" for key, o in overrides.items() if not o.is_sweep_override()]
        study = optuna.create_study(sampler=instantiate(self.sampler), direction=self.direction)
        for first in range(0, self.n_trials, self.n_jobs):
            trials = [study.ask(space) for _ in range(min(self.n_jobs, self.n_trials - first))]
            points = [[*fixed, *(f"{key}={value}" for key, value in trial.params.items())] for trial in trials]
            self.validate_batch_is_legal(points)
            for trial, done in zip(trials, self.launcher.launch(points, initial_job_idx=first), strict=True):
                value = float(done.return_value)
                study.tell(trial, *((None, optuna.trial.TrialState.FAIL) if math.isnan(value) else (value,)))
        return [trial.value for trial in study.trials]
