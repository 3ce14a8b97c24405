"""A probe's figures are kept with each run, and are those of the layers' own inference."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from wellcond.diagnostics import disparity
from wellcond.lab.errors import LabError
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.settings import Settings
from wellcond.lab.runs.training_options import PROBES
from wellcond.lab.training.probes import MEASURES, probe_network
from wellcond.lab.training.runner import Runner


@pytest.fixture(scope="module")
def plan():
    methods = ("SGDM", "BSR", "EvalNorm-fixed")
    return make_plan(Settings(methods=methods, epochs=1, train_images=128, seeds=1, ghost_batch=4, probe="disparity"))


@pytest.mark.parametrize(("place", "kind"), [(0, "ema"), (1, "bsr"), (2, "evalnorm_fixed")])
def test_disparity_is_that_of_the_methods_own_inference(plan, place, kind):
    method = plan.methods[place]
    spec = plan.spec(method, 0.1, seed=0)
    data = plan.task.for_seed(spec, torch.device("cpu"), 0, 1)
    model = method.with_layers(plan.task.initial_model(plan.template.model, 0, None), 4)
    images = [batch[0] for batch in islice(data.batches(), 8)]
    model(images[0])  # statistics of its own
    expected = disparity(model, images, batch_size=4).mean[kind]
    assert probe_network(model, data, spec) == {"probe": {"disparity": pytest.approx(expected)}}


def test_each_probe_that_can_be_named_is_measured():
    assert set(MEASURES) == set(PROBES)


def test_a_run_keeps_it(plan):
    record = Runner(plan.task, torch.device("cpu")).run(plan.spec(plan.methods[0], 0.1, seed=0))
    assert record.extras["probe"]["disparity"] > 0


def test_an_unknown_probe_names_the_known():
    with pytest.raises(LabError, match="unknown probe 'disparty': did you mean 'disparity'"):
        Settings(probe="disparty")
