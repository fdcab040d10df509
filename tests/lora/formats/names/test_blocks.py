import pytest

from lora.formats.names.blocks import EVERY, parse_blocks


def test_twelve_values_are_the_blocks_with_attention() -> None:
    found = parse_blocks([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, -1])
    assert found == {
        "BASE": 0,
        "IN04": 0.1,
        "IN05": 0.2,
        "IN07": 0.3,
        "IN08": 0.4,
        "MID": 0.5,
        "OUT00": 0.6,
        "OUT01": 0.7,
        "OUT02": 0.8,
        "OUT03": 0.9,
        "OUT04": 1,
        "OUT05": -1,
    }


def test_twenty_values_are_every_block() -> None:
    found = parse_blocks([n / 2 for n in range(20)])
    assert list(found) == list(EVERY)
    assert (found["BASE"], found["IN00"], found["MID"], found["OUT08"]) == (0, 0.5, 5, 9.5)


def test_text_with_commas_is_the_same_as_a_list() -> None:
    assert parse_blocks("1, 0,0,0,0 ,1,1,1,1,0,0,.5") == parse_blocks(
        [1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0.5]
    )


def test_a_single_name_overrules_its_side_wherever_it_stands() -> None:
    found = parse_blocks({"OUT01": 1.5, "OUT": 0, "M00": 0.25})
    assert found == {**{f"OUT{n:02}": 0 for n in range(9)}, "OUT01": 1.5, "MID": 0.25}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([1, 2, 3], "3 values are neither 12 nor 20"),
        ("1,a", "not numbers with commas"),
        ({"IN09": 1}, "'IN09' is no block"),
        ({"https://x?token=canary": 1}, "a name is no block"),
        ({"IN04": "1"}, "not a number"),
        ({"IN04": True}, "not a number"),
        ([11] * 12, "not between -10 and 10"),
        (["nan"] * 12, "not a number"),
        ("nan" + ",1" * 11, "not between"),
        (3, "neither a list"),
    ],
)
def test_what_is_no_block_scale_gets_a_sentence(value: object, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_blocks(value)
    assert said in str(caught.value)
    assert "canary" not in str(caught.value)
