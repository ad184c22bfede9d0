"""An instance that is far slower than predicted, and than the others, gets less work; others do not."""

from __future__ import annotations

import pytest

from services.gateway.routing.pace import LEAST, Pace, usual
from tests.kit.virtual import virtual


def paced(lag: float) -> Pace:
    return Pace(lag=lag, told=True)


def share(own: Pace, others: list[Pace]) -> float:
    own.judge(usual([own, *others]))
    return own.share


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        (0.0, [0.0], 1.0),
        (0.5, [0.0], 1.0),  # 1.6 times: noise
        (2.3, [0.0, 0.1], 0.1),
        (2.3, [2.3, 2.2], 1.0),  # all are
        (2.3, [], 1.0),  # nobody else is there
        (9.0, [0.0], LEAST),
        (-1.0, [0.0], 1.0),
        (0.0, [-2.0], 1.0),  # others are faster than their prediction: that is theirs
    ],
)
def test_share(own: float, others: list[float], expected: float) -> None:
    assert share(paced(own), [paced(lag) for lag in others]) == pytest.approx(expected, rel=0.2)


def test_ten_times_slower_is_seen_within_three_seconds_and_forgiven_within_minutes() -> None:
    pace = Pace()
    pace.note(1.0, 0, 4, 0.05)
    for second in range(2, 5):
        pace.note(float(second), 8 * second, 4, 0.05)  # 80 a second would be right
    assert share(pace, [paced(0.0)]) < 0.25
    for second in range(5, 20):
        pace.note(float(second), 8 * second, 4, 0.05)
    assert share(pace, [paced(0.0)]) == pytest.approx(0.1, rel=0.2)
    pace.note(20.0, 8 * 19, 0, 0.05)
    pace.note(220.0, 8 * 19, 0, 0.05)
    assert share(pace, [paced(0.0)]) == 1.0, "somebody has to try it again"


def test_streams_that_run_as_predicted_are_not_held_against_anybody() -> None:
    mesh = virtual("a", "b")
    for _ in range(6):
        lease = mesh.pick(max_tokens=1000)
        assert lease is not None
        mesh.begin(lease)
    mesh.run(10.0)
    instances = mesh.router.fleet.instances
    assert [instances[id].pace.share for id in "ab"] == [1.0, 1.0]
    assert all(instances[id].pace.told for id in "ab"), "20 ms were predicted, 50 ms it takes: both alike"
