"""What a tracking server has not been sent yet: kept in a file of the run's folder, in the order in which it was logged."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Message = dict[str, Any]
"""Plain values: what to call on the server's client, and with what."""


class Outbox:
    """Messages that wait for a server which does not answer; a run that is killed meanwhile finds them again.

    Args:
        file: where they are kept, a line each.
        seconds_between_tries: how long a server that did not answer is left alone.
    """

    def __init__(self, file: Path, seconds_between_tries: float = 30.0) -> None:
        self.file, self.seconds_between_tries = file, seconds_between_tries
        self._tried_at = -float("inf")
        self._is_whole = False

    def __len__(self) -> int:
        return sum(1 for _ in self.messages())

    @property
    def waits(self) -> bool:
        """Whether there is anything in it."""
        return self.file.exists()

    @property
    def is_due(self) -> bool:
        """Whether it is time to try again."""
        return time.monotonic() - self._tried_at >= self.seconds_between_tries

    def messages(self) -> Iterator[Message]:
        """What is in it, oldest first. A last line that a killed process wrote in part is left out: it will be logged again."""
        if self.file.exists():
            with open(self.file, encoding="utf-8") as lines:
                for line in lines:
                    if line.endswith("\n"):
                        yield json.loads(line)

    def put(self, message: Message) -> None:
        """Adds a message; the time of the next try counts from now where it is the first."""
        if not self.waits:
            self._tried_at = time.monotonic()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._drop_half_a_line()
        with open(self.file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(message) + "\n")

    def empty(self, send: Callable[[Message], bool]) -> int:
        """Sends all, oldest first, until `send` says that one could not be sent; returns how many were."""
        waiting = list(self.messages())
        sent = 0
        while sent < len(waiting) and send(waiting[sent]):
            sent += 1
        self._tried_at = time.monotonic()  # after the try, which may take longer than what lies between two of them
        if sent == len(waiting):
            self.file.unlink(missing_ok=True)
        elif sent:
            aside = self.file.with_name(f"{self.file.name}.partial")
            aside.write_text("".join(json.dumps(message) + "\n" for message in waiting[sent:]), encoding="utf-8")
            aside.replace(self.file)
        return sent

    def _drop_half_a_line(self) -> None:
        """Before the first message of this process: one written behind half a line could not be told from it."""
        if self._is_whole:
            return
        if self.file.exists():
            with open(self.file, "r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        self._is_whole = True
