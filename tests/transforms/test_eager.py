"""What the compiler is told while inputs are observed, whatever is collected meanwhile."""

import gc

import pytest
import torch
from torch import nn
from torch._dynamo import eval_frame

from wellcond.transforms import eager


class Owner:
    """Somebody who observes; in a circle, so that only the collector ends it."""

    def __init__(self) -> None:
        self.itself = self


class CollectsWhileRead(str):
    """A stance that is collected at, as a name is compared with it."""

    def __eq__(self, other: object) -> bool:
        gc.collect()
        return str.__eq__(self, other)

    __hash__ = str.__hash__


@pytest.fixture(autouse=True)
def nobody_else():
    gc.collect()
    before = dict(eager._hooked)
    eager._hooked.clear()
    yield
    eager._hooked.clear()
    eager._hooked.update(before)
    eager.run_eagerly(object(), ())


def test_an_owner_that_is_collected_while_the_compiler_reads_does_no_harm(monkeypatch):
    model = nn.Linear(2, 2)
    owner = Owner()
    eager.run_eagerly(owner, [model])
    stance = eval_frame._stance
    assert isinstance(stance, eager.EagerWithGradients)
    answer = stance._answer
    monkeypatch.setattr(stance, "_answer", lambda: CollectsWhileRead(answer()), raising=False)
    assert eval_frame._callback_from_stance(None) is None
    del owner
    # The first comparison collects the owner; those after it, in the same call, still mean the same answer.
    eval_frame._callback_from_stance(None)
    assert not eager._hooked
    eval_frame._callback_from_stance(None)
    assert stance.stance == "default"


def test_the_answer_of_one_call_stays_and_the_next_is_new():
    model = nn.Linear(2, 2)
    owner = Owner()
    eager.run_eagerly(owner, [model])
    stance = eval_frame._stance

    def call():
        first = stance.stance
        eager._forget(id(owner))
        return first, stance.stance

    assert call() == ("force_eager", "force_eager")
    assert call() == ("default", "default")


def test_torch_gets_its_own_stance_back_once_nobody_observes():
    owner = Owner()
    eager.run_eagerly(owner, [nn.Linear(1, 1)])
    assert isinstance(eval_frame._stance, eager.EagerWithGradients)
    eager.run_eagerly(owner, ())
    assert eval_frame._stance == eval_frame.DynamoStance()
    assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
