"""When two greedy answers are the same, when rounding explains a difference, and when it is another model."""

from __future__ import annotations

from services.llm.agreement import TOLERANCES, Agreement, Difference, Position, tolerance_of

BF16 = TOLERANCES["bfloat16"]


def answer(*tokens, top=None, drift=0.0):
    return [Position(token, -1.0 + drift, {token: -1.0, **(top or {})}) for token in tokens]


def test_equal_answers_are_the_same():
    found = Agreement()
    assert found.add(0, 0, answer(1, 2, 3), answer(1, 2, 3, drift=0.01)) == 3
    assert (found.positions, found.differences, found.faults(BF16)) == (3, [], [])


def test_a_close_race_is_told_and_explained_and_the_comparison_goes_on_behind_it():
    found, expected = Agreement(), answer(1, 2, 3, 4, top={9: -1.2})
    assert found.add(0, 0, expected, answer(1, 9, 7, 7)) == 2, "what follows a turn says nothing"
    assert found.add(0, 2, expected, answer(3, 4)) == 4
    (difference,) = found.differences
    assert (difference.at, difference.expected, difference.got, round(difference.gap, 6)) == (1, 2, 9, 0.2)
    assert found.positions == 4 and found.faults(BF16) == []
    assert found.faults(TOLERANCES["float32"]), "float32 does not round so much"


def test_another_model_is_found_by_its_tokens():
    found = Agreement()
    for at in range(4):
        found.add(0, at, answer(1, 2, 3, 4), answer(7))
    assert found.unexplained(BF16) == [Difference(0, at, at + 1, 7, None) for at in range(4)]
    assert found.faults(BF16) == ["top-1 agreement 0.0%, at least 98.0% is wanted"]


def test_another_model_is_found_by_its_certainty():
    found = Agreement()
    found.add(0, 0, answer(1, 2, 3), answer(1, 2, 3, drift=0.4))
    assert found.faults(BF16) == ["log-probabilities differ by 0.400 nats in the mean, at most 0.15"]


def test_nothing_compared_is_no_agreement():
    assert Agreement().faults(BF16) == ["no token was compared"]


def test_the_tolerance_follows_what_is_computed_in():
    assert [tolerance_of(*one)[0] for one in (("float16", ""), ("bfloat16", "awq"), ("", ""), ("float32", ""))] == [
        *("float16", "quantized", "bfloat16", "float32"),
    ]
