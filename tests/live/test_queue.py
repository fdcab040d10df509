import threading

from live.queue import UNSENT, Inbox, Waiting
from live.turns import Turns
from tests.waiting import PATIENCE, until


def waiting(seq: int) -> Waiting:
    return Waiting(seq, b"", None)


def test_a_client_that_keeps_to_its_room_loses_nothing() -> None:
    inbox = Inbox(room=2)
    assert inbox.put(waiting(0)) == inbox.put(waiting(1)) == []
    for seq in range(2, 20):
        taken = inbox.take(None)
        assert taken and taken.seq == seq - 2
        inbox.done()
        assert inbox.put(waiting(seq)) == []


def test_of_more_frames_the_newest_wins() -> None:
    inbox = Inbox(room=2)
    for seq in range(2):
        inbox.put(waiting(seq))
    assert inbox.take(None).seq == 0  # type: ignore[union-attr]
    lost = [one.seq for seq in range(2, 9) for one in inbox.put(waiting(seq))]
    assert lost == [1, 2, 3, 4, 5, 6, 7]
    assert inbox.take(None).seq == 8  # type: ignore[union-attr]


def test_nothing_is_taken_for_a_client_that_does_not_read() -> None:
    inbox = Inbox(room=2)
    inbox.put(waiting(0))
    for _ in range(UNSENT):
        inbox.answering(1)
    assert inbox.take(0.0) is None
    inbox.answering(-1)
    assert inbox.take(0.0).seq == 0  # type: ignore[union-attr]


def test_a_closed_inbox_wakes_who_waits() -> None:
    inbox, taken = Inbox(room=2), []
    thread = threading.Thread(target=lambda: taken.append(inbox.take(None)))
    thread.start()
    inbox.close()
    thread.join(PATIENCE)
    assert taken == [None]
    inbox.put(waiting(0))
    assert inbox.take(None) is None


def test_turns_go_round_in_the_order_of_asking_and_the_holder_sees_who_waits() -> None:
    turns, order = Turns(), []

    def work(name: int) -> None:
        with turns:
            order.append(name)

    with turns:
        assert not turns.wanted
        threads = []
        for name in range(5):
            threads.append(threading.Thread(target=work, args=(name,)))
            threads[-1].start()
            until(lambda count=name + 2: len(turns._line) == count)
        assert turns.wanted and order == []
    for thread in threads:
        thread.join(PATIENCE)
    assert order == [0, 1, 2, 3, 4]
    assert not turns.wanted
    with turns:
        pass
