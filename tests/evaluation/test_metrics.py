"""The metrics against numbers worked by hand and against the formulas written out as loops."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.errors import ConfigError
from perdure.evaluation import metrics

NAN = math.nan
R3 = [
    [0.1, 0.2, 0.0],
    [0.8, 0.3, 0.1],
    [0.6, 0.9, 0.3],
    [0.5, 0.7, 1.0],
]


def test_worked_example():
    """Three tasks, by hand from the formulas.

    average      (0.5 + 0.7 + 1.0) / 3 = 2.2 / 3
    backward     ((0.5 - 0.8) + (0.7 - 0.9)) / 2 = -0.25
    forgetting   ((max(0.8, 0.6) - 0.5) + (max(0.3, 0.9) - 0.7)) / 2 = (0.3 + 0.2) / 2 = 0.25
    forward      ((0.3 - 0.2) + (0.3 - 0.0)) / 2 = 0.2
    intransigence, alone [0.9, 0.9, 0.9]: (0.1 + 0.0 - 0.1) / 3 = 0
    learning     (0.8 + 0.9 + 1.0) / 3 = 0.9
    anytime      (0.8 + (0.6 + 0.9) / 2 + 2.2 / 3) / 3 = (0.8 + 0.75 + 0.7333) / 3
    micro, 1 : 1 : 2 rows   (0.5 + 0.7 + 2.0) / 4 = 0.8
    """
    assert metrics.average(R3) == pytest.approx(2.2 / 3)
    assert metrics.backward_transfer(R3) == pytest.approx(-0.25)
    assert metrics.forgetting(R3) == pytest.approx(0.25)
    assert metrics.forward_transfer(R3) == pytest.approx(0.2)
    assert metrics.intransigence(R3, [0.9, 0.9, 0.9]) == pytest.approx(0.0)
    assert metrics.learning_accuracy(R3) == pytest.approx(0.9)
    assert metrics.anytime_average(R3) == pytest.approx((0.8 + 0.75 + 2.2 / 3) / 3)
    assert metrics.micro_average(R3, [1, 1, 2]) == pytest.approx(0.8)


def test_pairwise_transfer_by_hand():
    """The worked example: each row minus the one above it.

    Task 1's training: 0.8 - 0.1, 0.3 - 0.2, 0.1 - 0.0; task 2's: 0.6 - 0.8, 0.9 - 0.3, 0.3 - 0.1; task 3's:
    0.5 - 0.6, 0.7 - 0.9, 1.0 - 0.3. As a loss, all of it turns round; what has no row beside it is not known.
    """
    by_hand = [[0.7, 0.1, 0.1], [-0.2, 0.6, 0.2], [-0.1, -0.2, 0.7]]
    np.testing.assert_allclose(metrics.pairwise_transfer(R3), by_hand)
    np.testing.assert_allclose(metrics.pairwise_transfer(R3, higher_is_better=False), -np.array(by_hand))
    assert metrics.summary(R3)["pairwise_transfer"] == metrics.pairwise_transfer(R3).tolist()
    gap = metrics.pairwise_transfer([[0.0, NAN], [1.0, 0.25], [0.5, 1.0]])
    np.testing.assert_array_equal(gap, [[1.0, NAN], [-0.5, 0.75]])


def test_forgetting_counts_a_best_from_before_the_task_was_trained():
    """Task 2 had 0.9 in row 1, before its own training, 0.5 after it, and ends at 0.4 in row 3.

    max over t = 1, 2 is 0.9, so it lost 0.5; task 1 lost 0.6 - 0.6 = 0: forgetting 0.25.
    """
    assert metrics.forgetting([[0, 0, 0], [0.6, 0.9, 0], [0.6, 0.5, 0], [0.6, 0.4, 1]]) == pytest.approx(0.25)


def test_forgetting_ignores_row_zero():
    """Task 1 had 0.9 before training and 0.5 ever after: the best from row 1 is 0.5, nothing was lost."""
    assert metrics.forgetting([[0.9, 0], [0.5, 0], [0.5, 1]]) == 0


def test_loss_that_rose_is_forgetting():
    """The loss of task 1 went 7 -> 2 -> 4: the best over rows 1..T-1 is 2, lost 4 - 2 = 2 nats, transfer -2.

    Task 2 had 5 at the start and 3 before its own training: earlier training helped by 2. Alone, the tasks reach
    1.5 and 1; here 2 and 1: (0.5 + 0) / 2 worse.
    """
    R = [[7.0, 5.0], [2.0, 3.0], [4.0, 1.0]]
    loss = {"higher_is_better": False}
    assert metrics.forgetting(R, **loss) == 2.0
    assert metrics.backward_transfer(R, **loss) == -2.0
    assert metrics.forward_transfer(R, **loss) == 2.0
    assert metrics.intransigence(R, [1.5, 1.0], **loss) == 0.25
    assert metrics.average(R, **loss) == 2.5
    assert metrics.learning_accuracy(R, **loss) == 1.5


def test_cells_not_measured_are_left_out():
    """Task 2 of three was never measured at the end, and task 1 not after task 2.

    average (0.5 + 1.0) / 2; forgetting: task 1 alone, best of {0.8} - 0.5 = 0.3; backward 0.5 - 0.8 = -0.3;
    forward: task 2 has no score before its training, task 3: 0.3 - 0.0; learning (0.8 + 0.9 + 1.0) / 3;
    anytime (0.8 + 0.9 + 0.75) / 3; micro over tasks 1 and 3: (1 * 0.5 + 3 * 1.0) / 4 = 0.875.
    """
    R = [[0.1, 0.2, 0.0], [0.8, NAN, 0.1], [NAN, 0.9, 0.3], [0.5, NAN, 1.0]]
    assert metrics.average(R) == pytest.approx(0.75)
    assert metrics.forgetting(R) == pytest.approx(0.3)
    assert metrics.backward_transfer(R) == pytest.approx(-0.3)
    assert metrics.forward_transfer(R) == pytest.approx(0.3)
    assert metrics.learning_accuracy(R) == pytest.approx(0.9)
    assert metrics.anytime_average(R) == pytest.approx((0.8 + 0.9 + 0.75) / 3)
    assert metrics.micro_average(R, [1, 7, 3]) == pytest.approx(0.875)
    assert metrics.intransigence(R, [0.9, NAN, 1.0]) == pytest.approx(0.05)


def test_one_task_has_nothing_to_forget():
    R = [[0.2], [0.9]]
    assert metrics.average(R) == metrics.learning_accuracy(R) == metrics.anytime_average(R) == 0.9
    assert math.isnan(metrics.forgetting(R))
    assert math.isnan(metrics.backward_transfer(R))
    assert math.isnan(metrics.forward_transfer(R))
    assert metrics.intransigence(R, [1.0]) == pytest.approx(0.1)


def test_nothing_measured_is_nan_without_a_warning():
    R = np.full((4, 3), NAN)
    values = metrics.summary(R, counts=[1, 1, 1], isolated=[1, 1, 1])
    assert np.isnan(values.pop("pairwise_transfer")).all()
    assert all(math.isnan(v) for k, v in values.items() if k not in ("higher_is_better", "per_task"))
    assert all(math.isnan(v) for row in values["per_task"].values() for v in row.values())


def test_a_diverged_loss_raises_no_warning():
    R = [[math.inf, 1.0], [math.inf, 1.0], [math.inf, 2.0]]
    assert math.isnan(metrics.forgetting(R, higher_is_better=False))
    assert metrics.average(R) == math.inf


@pytest.mark.parametrize(
    "R",
    [
        torch.tensor(R3, dtype=torch.float64, requires_grad=True),
        torch.tensor(R3, dtype=torch.bfloat16),
        np.array(R3, dtype=np.float32),
        [tuple(row) for row in R3],
    ],
    ids=["torch", "bfloat16", "float32", "tuples"],
)
def test_array_likes(R):
    assert metrics.forgetting(R) == pytest.approx(0.25, abs=0.01)


def test_none_is_not_measured():
    assert metrics.average([[0.0, 0.0], [1.0, 0.0], [None, 0.5]]) == 0.5


@pytest.mark.parametrize(
    ("R", "shape"),
    [([[1.0, 2.0], [1.0, 2.0]], "[2, 2]"), ([1.0, 2.0], "[2]"), (np.zeros((1, 0)), "[1, 0]"), (3.0, "[]")],
)
def test_wrong_shape_names_the_one_wanted(R, shape):
    with pytest.raises(ValueError, match=re.escape("[T+1, T]") + ".*" + re.escape(f"got shape {shape}")):
        metrics.average(R)


def test_ragged_rows_and_words_are_refused():
    with pytest.raises(ConfigError, match="R must be an array of numbers"):
        metrics.average([[1.0, 2.0], [1.0]])
    with pytest.raises(ConfigError, match="R must be an array of numbers"):
        metrics.average([["high"], ["low"]])


def test_vectors_of_the_wrong_length_are_named():
    with pytest.raises(ConfigError, match=r"isolated must hold one value a task, shape \[3\], got shape \[2\]"):
        metrics.intransigence(R3, [1, 2])
    with pytest.raises(ConfigError, match="counts must hold"):
        metrics.micro_average(R3, [1])
    with pytest.raises(ConfigError, match="counts must not be negative"):
        metrics.micro_average(R3, [1, -1, 1])
    with pytest.raises(ConfigError, match="3 different names"):
        metrics.summary(R3, tasks=["a", "a", "b"])


def test_summary():
    """The worked example; per task the best of rows 1..3 is 0.8, 0.9, 1.0, and 0.3 and 0.2 were lost."""
    values = metrics.summary(R3, tasks=["a", "b", "c"], counts=[1, 1, 2], isolated=[0.9, 0.9, 0.9])
    assert values["forgetting"] == pytest.approx(0.25)
    assert values["learning"] == pytest.approx(0.9)
    assert values["micro_average"] == pytest.approx(0.8)
    assert values["intransigence"] == pytest.approx(0.0)
    assert values["higher_is_better"] is True
    assert values["per_task"]["a"] == pytest.approx(
        {"before": 0.1, "learnt": 0.8, "final": 0.5, "best": 0.8, "forgetting": 0.3}
    )
    assert math.isnan(values["per_task"]["c"]["forgetting"])


# Independent of the module: the formulas of the module's docstring as loops over tasks numbered from 1.


def known(values):
    return [value for value in values if not math.isnan(value)]


def mean(values):
    values = known(values)
    return sum(values) / len(values) if values else NAN


def slow(R, alone, s):
    """R as nested lists; s is 1 when higher is better, -1 for a loss."""
    T = len(R[0])

    def r(t, i):
        return R[t][i - 1]

    def best(i):
        seen = known(r(t, i) for t in range(1, T))
        return NAN if not seen else max(seen) if s > 0 else min(seen)

    return {
        "average": mean(r(T, i) for i in range(1, T + 1)),
        "backward_transfer": mean(s * (r(T, i) - r(i, i)) for i in range(1, T)),
        "forgetting": mean(s * (best(i) - r(T, i)) for i in range(1, T)),
        "forward_transfer": mean(s * (r(i - 1, i) - r(0, i)) for i in range(2, T + 1)),
        "intransigence": mean(s * (alone[i - 1] - r(i, i)) for i in range(1, T + 1)),
        "learning": mean(r(i, i) for i in range(1, T + 1)),
        "anytime_average": mean(mean(r(t, i) for i in range(1, t + 1)) for t in range(1, T + 1)),
    }


scores = st.one_of(st.just(NAN), st.floats(-10, 10, allow_subnormal=False))


@st.composite
def streams(draw):
    T = draw(st.integers(1, 5))
    rows = [draw(st.lists(scores, min_size=T, max_size=T)) for _ in range(T + 2)]
    return rows[:-1], rows[-1]


@settings(max_examples=150, deadline=None)
@given(streams(), st.booleans())
def test_agrees_with_the_formulas_as_loops(stream, higher):
    R, alone = stream
    got = metrics.summary(R, higher, isolated=alone)
    for name, value in slow(R, alone, 1 if higher else -1).items():
        assert got[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name


@settings(max_examples=100, deadline=None)
@given(streams(), st.booleans())
def test_pairwise_transfer_adds_up_to_the_other_metrics(stream, higher):
    """Column i sums to R[T, i] - R[0, i]; the parts below and above the diagonal are the two transfers."""
    R = np.nan_to_num(np.array(stream[0]))
    T, sign = R.shape[1], 1 if higher else -1
    P = metrics.pairwise_transfer(R, higher_is_better=higher)
    assert P.shape == (T, T)
    np.testing.assert_allclose(P.sum(0), sign * (R[-1] - R[0]), atol=1e-9)
    got = metrics.summary(R, higher)
    if T > 1:
        assert np.tril(P, -1).sum() / (T - 1) == pytest.approx(got["backward_transfer"], abs=1e-9)
        assert np.triu(P, 1).sum() / (T - 1) == pytest.approx(got["forward_transfer"], abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(streams())
def test_a_loss_is_a_score_turned_round(stream):
    """Differences of -R as a loss equal those of R as a score; averages keep the metric's units and negate."""
    R, alone = np.array(stream[0]), np.array(stream[1])
    score = metrics.summary(R, True, isolated=alone)
    loss = metrics.summary(-R, False, isolated=-alone)
    for name in ("forgetting", "backward_transfer", "forward_transfer", "intransigence"):
        assert loss[name] == pytest.approx(score[name], nan_ok=True)
    for name in ("average", "learning", "anytime_average"):
        assert loss[name] == pytest.approx(-score[name], nan_ok=True)
