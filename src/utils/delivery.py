"""Delivers messages to an MLflow server that goes away and comes back, in order; what it does not accept yet waits on disk."""

import logging
from collections.abc import Callable, Iterator, Sequence

from mlflow.exceptions import MlflowException

from src.utils.outbox import NO_ANSWER, Message, Outbox, first_line, is_refusal, retryable, summary
from src.utils.secrets import redact

log = logging.getLogger(__name__)


class Delivery:
    """Sends messages, or queues them behind those that wait.

    Args:
        deliver: sends a message.
        outboxes: of values (calls of `log_batch`) and of files, so that an artifact store that fails delays no metric; without them every
            error propagates.
        store: URI of the server, for warnings.
    """

    def __init__(self, deliver: Callable[[Message], None], outboxes: Sequence[Outbox], store: str) -> None:
        self._deliver, self._outboxes, self._store = deliver, outboxes, store
        self._warned: set[str] = set()

    def waiting_values(self) -> Iterator[Message]:
        """Yields the values that wait."""
        return self._outboxes[0].messages() if self._outboxes else iter(())

    def send(self, message: Message) -> None:
        """Delivers a message, or queues it. The first one that is queued is warned about."""
        if not self._outboxes:
            self._deliver(message)
            return
        values, files = self._outboxes
        outbox = values if message["call"] == "log_batch" else files
        if reachable := self._flush(values):  # else files are not tried
            self._flush(files)
        error = None
        if reachable and not outbox.waits:
            error = self._try(message)
            if error is None:
                return
        outbox.put(message)
        what = "does not answer" if isinstance(error, NO_ANSWER) else "does not store files"
        if error is not None and what not in self._warned:
            self._warned.add(what)
            log.warning(
                "MLflow at %s %s (%s): training goes on; messages are kept in %s and sent when it does",
                *(redact(self._store), what, first_line(error), outbox.file),
            )

    def unsent(self) -> list[Outbox]:
        """Tries all outboxes now; returns those that still wait. Files are not tried if values wait, as the server is away."""
        waiting: list[Outbox] = []
        for outbox in self._outboxes:
            if outbox.waits and (waiting or not self._flush(outbox, force=True)):
                waiting.append(outbox)
        return waiting

    def settle(self) -> bool:
        """Tries all outboxes for the last time, and says where messages stay; returns whether the server answers."""
        waiting = self.unsent()
        if not waiting:
            return True
        away, places = waiting[0] is self._outboxes[0], " and ".join(str(outbox.file) for outbox in waiting)
        what = "does not answer" if away else "does not store files"
        log.warning("MLflow still %s: unsent messages are in %s, and are sent by the next ckpt_path=last", what, places)
        return not away

    def _flush(self, outbox: Outbox, force: bool = False) -> bool:
        """Sends what waits, if it is due; returns whether nothing waits. Messages that the server rejects are dropped with a warning."""

        def send(message: Message) -> bool:
            try:
                return self._try(message) is None
            except MlflowException as error:
                log.warning("MLflow refuses %s, which waited (%s): it is dropped", summary(message), first_line(error))
                return True

        if outbox.waits and (force or outbox.is_due):
            sent = outbox.empty(send)
            if sent and not outbox.waits:
                self._warned.clear()
                log.warning("MLflow answers again: %d messages that waited were sent", sent)
        return not outbox.waits

    def _try(self, message: Message) -> Exception | None:
        """Delivers a message; returns the error if it may pass, raises it if the server rejects the content."""
        try:
            self._deliver(message)
        except retryable() as error:
            if is_refusal(error):
                raise
            return error
        return None
