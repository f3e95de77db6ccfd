"""Number of cases of property tests: a hundred fixed ones in the fast suite, thousands of random ones in the slow suite."""

import pytest
from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}

HUNDRED_OR_THOUSANDS = [
    pytest.param(settings(max_examples=100, derandomize=True, **_COMMON), id="hundred"),
    pytest.param(
        settings(max_examples=2000, print_blob=True, **_COMMON), id="thousands", marks=[pytest.mark.slow, pytest.mark.timeout(1200)]
    ),
]
