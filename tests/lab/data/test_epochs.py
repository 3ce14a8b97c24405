"""Batches that keep their place: those that come after a stop are those of an epoch that was not interrupted."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wellcond.lab.data.epochs import Epochs


def numbered(length):
    return Epochs(lambda epoch, first: ((epoch, batch) for batch in range(first, length)), length)


@given(length=st.integers(1, 6), epoch=st.integers(0, 4), batch=st.integers(0, 6), taken=st.integers(0, 20))
def test_resumed_batches_are_those_of_whole_epochs(length, epoch, batch, taken):
    epochs, place = numbered(length), epoch * length + min(batch, length)
    epochs.resume_at(epoch, min(batch, length))
    every = [(number // length, number % length) for number in range(place, place + taken)]
    assert list(islice(epochs.endless(), taken)) == every


def test_an_iteration_that_is_left_is_an_epoch_that_was_begun():
    epochs = numbered(3)
    assert next(iter(epochs)) == (0, 0)
    assert epochs.epoch == 1
    assert list(epochs) == [(1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize("batch", [-1, 4])
def test_a_place_beyond_the_epoch_is_refused(batch):
    with pytest.raises(ValueError, match=f"batch must be between 0 and 3, got {batch}"):
        numbered(3).resume_at(0, batch)
