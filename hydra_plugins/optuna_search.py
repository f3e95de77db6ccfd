"""A Hydra sweeper over today's Optuna: `hydra/sweeper=optuna`, see configs/hydra/sweeper/optuna.yaml.

Hydra finds plugins in the namespace package `hydra_plugins` alone. Its own hydra-optuna-sweeper needs an Optuna below 3.
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
    """What a sweep over a key means to Optuna: `interval(a, b)` is a range of floats, `int(interval(a, b))` one of whole numbers, either
    logarithmic in `tag(log, ...)`; `a,b`, `choice(...)`, `range(...)` and `glob(...)` are lists to choose from.
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
    """Asks Optuna for points, has the launcher run them, tells Optuna what they returned.

    The study lives in memory. Going on with a search asks for the same points again: the sampler is seeded, and points that
    have finished return at once what they returned before (src/utils/sweeps.py). A failed point returns nan.

    Args:
        sampler: config of an Optuna sampler; give it a seed.
        direction: `maximize` or `minimize`.
        n_trials: points in all.
        n_jobs: points asked for at a time, and run side by side by launchers that can.
        params: swept keys and their values, as on the command line, which wins.
    """

    def __init__(self, sampler: DictConfig, direction: Direction, n_trials: int, n_jobs: int, params: DictConfig | None) -> None:
        self.sampler, self.direction, self.n_trials, self.n_jobs = sampler, direction, n_trials, n_jobs
        self.params: dict[str, str] = {str(key): str(value) for key, value in (params or {}).items()}
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        """Runs the search; `arguments` are the overrides of the command line.

        Raises:
            SystemExit: Optuna is not installed, or nothing is named to optimise.
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
