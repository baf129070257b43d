"""The rule by which a row's task is inferred, against entropies worked out by hand, and rows of several tasks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perdure.config import EvaluationSettings, TrainingSettings
from perdure.errors import ConfigError
from perdure.models.objectives import collate
from perdure.strategies import Chain, Naive, Replay, Strategy, build
from perdure.strategies.base import StrategyError
from perdure.strategies.identity import forward_by_task, prompt_ends, surest
from perdure.training.learner import Learner
from perdure.types import IGNORE, Batch, Example, Output


def rows(*tasks: str) -> list[Example]:
    return [Example(str(i), task, x=torch.tensor([float(i)]), y=torch.tensor(0)) for i, task in enumerate(tasks)]


class Told(Strategy):
    """Classes with the odds 1:1 under task a; under b 3:1 for rows above 0, 1:1 otherwise."""

    name = "told"
    wants_task_ids = True
    isolates = True

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        def one(task: str, batch: Batch) -> Tensor:
            assert isinstance(batch.x, Tensor)
            odds = math.log(3) * (batch.x > 0) if task == "b" else 0 * batch.x
            return torch.cat([odds, torch.zeros_like(batch.x)], 1)

        return forward_by_task(batch, one)

    def identify(self, model: nn.Module, batch: Batch) -> list[str]:
        return surest(self.forward, model, batch, ["a", "b"], "classification")


def test_rows_of_several_tasks_go_through_their_own_and_keep_their_order() -> None:
    batch = collate(rows("b", "a", "b", "a"), "classification")
    seen: list[tuple[str, list[str]]] = []

    def one(task: str, part: Batch) -> Tensor:
        seen.append((task, [row.key for row in part.examples]))
        assert isinstance(part.x, Tensor)
        return part.x * (10 if task == "b" else 1)

    assert forward_by_task(batch, one).logits.flatten().tolist() == [0, 1, 20, 3]
    assert seen == [("b", ["0", "2"]), ("a", ["1", "3"])]


def test_the_surest_task_is_taken_and_of_equals_the_first() -> None:
    """Entropies: ln 2 = 0.693 under a; under b 0.562 for odds of 3:1, and ln 2 for the row at 0."""
    batch = collate(rows("", "", "x"), "classification")
    strategy = Told()
    assert strategy.identify(nn.Linear(1, 2), batch) == ["a", "b", "b"]
    assert surest(strategy.forward, nn.Linear(1, 2), batch, [], "classification") == ["", "", ""]


def test_a_prompt_ends_before_the_first_label() -> None:
    """Labels: none, from the third on, and from the first on; the second row is padded."""
    lengths, first = [5, 4, 3], [None, 2, 0]
    made = []
    for i, (length, start) in enumerate(zip(lengths, first, strict=True)):
        y = torch.full((length,), IGNORE)
        if start is not None:
            y[start:] = 7
        made.append(Example(str(i), x=torch.arange(length), y=y))
    assert prompt_ends(collate(made, "causal_lm")).tolist() == [4, 1, 0]


def test_labels_are_not_looked_at() -> None:
    """The first answer token is judged by its distribution, which is that after the last token of the prompt."""
    logits = torch.zeros(1, 4, 3)
    logits[0, 1, 2] = 5.0  # sure under b, at the end of the prompt
    both = {"a": torch.zeros(1, 4, 3), "b": logits}
    for label in (1, 2):
        row = Example("r", x=torch.arange(4), y=torch.tensor([IGNORE, IGNORE, label, label]))
        batch = collate([row], "causal_lm")
        found = surest(lambda _, told: Output(both[told.examples[0].task]), nn.Linear(1, 1), batch, ["a", "b"],
                       "causal_lm")  # fmt: skip
        assert found == ["b"]


def test_a_regression_has_no_rule() -> None:
    batch = collate([Example("r", x=torch.ones(1), y=torch.tensor(0.5))], "regression")
    with pytest.raises(ConfigError, match="task_id"):
        surest(Told().forward, nn.Linear(1, 1), batch, ["a"], "regression")


def test_told_and_inferred_scores_stand_side_by_side() -> None:
    """Rows 0 to 3, told a: right by chance of the first class. Told b for rows above 0, as inferred, too."""
    learner = Learner(nn.Linear(1, 2), Told(), "classification", TrainingSettings(), 0)
    made = rows("a", "a", "a", "a")
    found = learner.score_both(made)
    assert found["loss"] == pytest.approx(math.log(2))
    assert found["loss_inferred"] == pytest.approx((math.log(2) - 3 * math.log(0.75)) / 4)
    assert set(found) == {"loss", "accuracy", "loss_inferred", "accuracy_inferred"}
    assert [row.task for row in learner.identified(made)] == ["a", "b", "b", "b"]
    assert set(learner.score(made, plain=True)) == {"loss", "accuracy"}
    naive = Learner(nn.Linear(1, 2), Naive(), "classification", TrainingSettings(), 0)
    assert set(naive.score_both(made)) == {"loss", "accuracy"}


def test_answers_are_told_and_inferred(make_lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strategy that answers token 5 to rows of b and 6 to others, and takes every row for b."""
    from perdure.streams.encode import Encoder
    from perdure.training.measure import Measure

    class Fixed(Strategy):
        wants_task_ids = True

        def forward(self, model: nn.Module, batch: Batch) -> Output:
            assert isinstance(batch.x, Tensor)
            logits = torch.zeros(*batch.x.shape, 40)
            for i, row in enumerate(batch.examples):
                logits[i, :, 5 if row.task == "b" else 6] = 1
            return Output(logits)

        def identify(self, model: nn.Module, batch: Batch) -> list[str]:
            return ["b" for _ in batch.examples]

    class Words:
        eos_token_id, bos_token_id = 2, None

        def decode(self, tokens: list[int], **_: Any) -> str:
            return " ".join(map(str, tokens))

    learner = Learner(make_lm(), Fixed(), "causal_lm", TrainingSettings(), 0)
    encoder = object.__new__(Encoder)
    encoder.tokenizer, encoder.eos, encoder.max_length = Words(), 2, 16  # type: ignore[assignment]
    measure = Measure(learner, encoder, EvaluationSettings(max_new_tokens=2), 0)
    prompts = [
        Example(str(i), task, x=torch.tensor([3, 4]), y=torch.full((2,), IGNORE)) for i, task in enumerate("aba")
    ]
    assert measure.answers(prompts, 2) == ["6 6", "5 5", "6 6"]
    references = ["6 6", "5 5", "5 5"]
    monkeypatch.setattr(measure, "_prepare", lambda *_: (prompts, references, 2))
    labelled = [row.but(y=torch.tensor([IGNORE, 5])) for row in prompts]
    found = measure("t", labelled)
    assert (found["exact_match"], found["exact_match_inferred"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    untold = measure("t", labelled, told=False)
    assert untold["exact_match"] == pytest.approx(2 / 3)
    assert "exact_match_inferred" not in untold


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("freeze-bottom+osf", "decides alone"),
        ("pnn+freeze-bottom", "decides alone"),
        ("prompt-pool+freeze-bottom", "decides alone"),
        ("magmax+prompt-pool", "put prompt-pool first"),
        ("ewc+pnn", "act on nothing"),
    ],
)
def test_chains_in_which_a_member_would_do_nothing_are_refused(names: str, words: str) -> None:
    with pytest.raises(StrategyError, match=words):
        build(names)


def test_merging_behind_what_it_merges_is_not() -> None:
    assert build("prompt-pool+magmax").merges


def test_rehearsal_beside_isolated_tasks_is_refused() -> None:
    with pytest.raises(StrategyError, match="would train nothing"):
        Chain([Told(), Replay(capacity=4)])
