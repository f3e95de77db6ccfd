import time
from pathlib import Path

from src.utils.outbox import Message, Outbox


def test_messages_wait_in_order_over_processes_and_a_half_written_line_is_no_message(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "new" / "unsent.jsonl")
    assert not box.waits
    for number in range(3):
        box.put({"number": number})
    with open(box.file, "a") as file:
        file.write('{"number": 3')  # the process was killed here
    again = Outbox(box.file, seconds_between_tries=0)
    assert again.waits
    assert again.is_due
    assert not Outbox(tmp_path / "other.jsonl").waits
    sent: list[Message] = []

    def send(message: Message) -> bool:
        if len(sent) == 2:
            return False
        sent.append(message)
        return True

    assert again.empty(send) == 2
    assert list(again.messages()) == [{"number": 2}]
    sent.clear()
    assert again.empty(send) == 1
    assert not again.waits
    assert again.empty(send) == 0


def test_a_server_is_left_alone_for_a_while(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "unsent.jsonl", seconds_between_tries=1000)
    box.put({})
    assert not box.is_due
    assert Outbox(box.file, seconds_between_tries=1000).is_due  # a new process tries at once


def test_what_is_put_behind_half_a_line_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "unsent.jsonl").write_text('{"number": 0}\n{"number": 1')  # the process was killed here
    box = Outbox(tmp_path / "unsent.jsonl")
    for number in (2, 3):
        box.put({"number": number})
    assert list(Outbox(box.file).messages()) == [{"number": number} for number in (0, 2, 3)]


def test_the_time_of_a_try_is_that_of_its_end(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "unsent.jsonl", seconds_between_tries=0.2)
    box.put({})

    def in_vain(message: Message) -> bool:
        time.sleep(0.3)
        return False

    assert box.empty(in_vain) == 0
    assert not box.is_due
