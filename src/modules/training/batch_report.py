"""What every method says of a batch: its module writes it, the callbacks that serve all methods read it."""

from typing import Protocol


class BatchReport(Protocol):
    """One batch, seconds by phase, tokens, and means of what the optimiser's steps saw; see StepReport and ContrastiveReport."""

    @property
    def update(self) -> dict[str, float]: ...

    @property
    def seconds(self) -> dict[str, float]: ...

    @property
    def rollout_tokens(self) -> int: ...

    @property
    def update_tokens(self) -> int: ...

    def headline(self) -> dict[str, str]:
        """What a line of progress says of it."""


def speed(tokens: int, seconds: float | None) -> str:
    """Tokens a second, for a headline."""
    return f"{tokens / seconds:.0f}" if seconds else "?"
