"""How many cases the property tests try: a hundred, the same every time, in the fast suite; thousands of new ones in the slow one."""

import pytest
from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}

HUNDRED_OR_THOUSANDS = [
    pytest.param(settings(max_examples=100, derandomize=True, **_COMMON), id="hundred"),
    pytest.param(
        settings(max_examples=2000, print_blob=True, **_COMMON), id="thousands", marks=[pytest.mark.slow, pytest.mark.timeout(1200)]
    ),
]
