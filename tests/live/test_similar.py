from PIL import Image

from live.similar import MOST, Similar
from tests.live.streams import picture


def test_without_a_threshold_nothing_is_skipped() -> None:
    for threshold in (None, 1.0):
        similar = Similar(threshold)
        assert not any(similar.skips(picture(0)) for _ in range(50))


def test_equal_frames_are_skipped_but_not_for_ever() -> None:
    similar = Similar(0.98)
    skipped = [similar.skips(picture(0)) for _ in range(3 * (MOST + 1))]
    assert skipped == ([False] + [True] * MOST) * 3


def test_frames_below_the_threshold_are_all_drawn() -> None:
    similar = Similar(0.98)
    black, white = Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), "white")
    assert not any(similar.skips(one) for one in (black, white) * 20)


def test_the_more_alike_the_more_are_skipped_and_a_seed_chooses_the_same() -> None:
    def share(step: float) -> float:
        similar = Similar(0.9, seed=3)
        return sum(similar.skips(picture(round(n * step))) for n in range(200)) / 200

    assert share(0.1) > share(3) > share(8)
    assert share(3) == share(3)


def test_forgetting_draws_the_next() -> None:
    similar = Similar(0.5)
    assert [similar.skips(picture(0)), similar.skips(picture(0))] == [False, True]
    similar.forget()
    assert not similar.skips(picture(0))
