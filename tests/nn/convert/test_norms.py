"""Converting whole models: what is kept, in which directions, what is refused, and that a refusal changes nothing."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import wellcond
from wellcond.nn.convert.norms import convert_norm
from wellcond.nn.norm.base import StatisticsNorm
from wellcond.nn.norm.bsr import BSRBatchNorm1d, BSRBatchNorm2d
from wellcond.nn.norm.cross_iteration import CrossIterationBatchNorm2d
from wellcond.nn.norm.evalnorm import EvalNorm2d
from wellcond.nn.norm.ghost import GhostBatchNorm2d
from wellcond.nn.norm.momentum import MomentumBatchNorm1d, MomentumBatchNorm2d, MomentumBatchNorm3d
from wellcond.nn.norm.population import PopulationNorm2d
from wellcond.nn.norm.renorm import BatchRenorm2d

KINDS = {
    "ghost": (GhostBatchNorm2d, {"group_size": 2}),
    "mbn": (MomentumBatchNorm2d, {}),
    "bsr": (BSRBatchNorm2d, {}),
    "brn": (BatchRenorm2d, {}),
    "cbn": (CrossIterationBatchNorm2d, {"compensate": False}),
    "evalnorm": (EvalNorm2d, {}),
    "pn": (PopulationNorm2d, {}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def small_model(dtype=torch.float32, **arguments):
    """Two convolutions with batch normalization, statistics and affine parameters as after training."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, **arguments),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4, eps=1e-3, **arguments)),
    )
    return randomize(model).to(dtype)


def randomize(model):
    """Give every batch normalization the statistics and parameters of one that has been trained."""
    with torch.no_grad():
        for layer in batch_norms(model):
            if layer.running_mean is not None:
                layer.running_mean.normal_(0, 0.3)
                layer.running_var.uniform_(0.5, 2)
                layer.num_batches_tracked.fill_(17)
            for parameter, mean in ((layer.weight, 1.0), (layer.bias, 0.0)):
                if parameter is not None:
                    parameter.normal_(mean, 0.1)
    return model


def batch_norms(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def images(dtype=torch.float32):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


def snapshot(model):
    """Everything that a conversion may change, as plain values."""
    return [
        (name, type(module), {key: str(value) for key, value in sorted(vars(module).items())})
        for name, module in model.named_modules()
    ]


# directions ---------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_there_and_back_is_the_same_bit_for_bit(kind, dtype):
    model, x = small_model(dtype).eval(), images(dtype)
    expected, state = model(x), copy.deepcopy(model.state_dict())
    layer_type, options = KINDS[kind]

    assert convert_norm(model, kind, **options) is model
    assert type(model[1]) is type(model[3][1]) is layer_type
    assert (model[1].eps, model[3][1].eps) == (1e-5, 1e-3)
    assert model[1].weight.dtype == dtype
    assert model[1].running_mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    output = model(x)
    assert output.dtype == dtype
    if kind in ("bsr", "evalnorm"):  # Through instance statistics, which only rounding shows.
        torch.testing.assert_close(output, expected)
    else:
        assert torch.equal(output, expected)

    convert_norm(model, "bn")
    assert type(model[1]) is type(model[3][1]) is nn.BatchNorm2d
    assert torch.equal(model(x), expected)
    assert_same_state(model.state_dict(), state)
    assert vars(model[1]).keys() == vars(nn.BatchNorm2d(8)).keys()


@every_kind
@pytest.mark.parametrize("other", KINDS)
def test_between_kinds(kind, other):
    model = small_model().eval()
    state = copy.deepcopy(model.state_dict())
    convert_norm(convert_norm(model, kind, **KINDS[kind][1]), other, **KINDS[other][1])
    assert type(model[1]) is KINDS[other][0]
    fresh = KINDS[other][0](8, **KINDS[other][1])
    assert vars(model[1]).keys() == vars(fresh).keys()
    assert model[1].state_dict().keys() == fresh.state_dict().keys()
    convert_norm(model, "bn")
    assert_same_state(model.state_dict(), state)


@every_kind
def test_a_converted_layer_trains_as_one_of_its_kind(kind):
    layer_type, options = KINDS[kind]
    reference = layer_type(8, **options)
    converted = convert_norm(nn.BatchNorm2d(8, momentum=reference.momentum), kind, **options)
    torch.manual_seed(0)
    for _ in range(3):
        x = torch.randn(6, 8, 3, 3)
        assert torch.equal(converted(x), reference(x))
    assert_same_state(converted.state_dict(), reference.state_dict())
    x = torch.randn(6, 8, 3, 3)
    assert torch.equal(converted.eval()(x), reference.eval()(x))
    assert repr(converted) == repr(reference)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (nn.BatchNorm1d, MomentumBatchNorm1d),
        (nn.BatchNorm2d, MomentumBatchNorm2d),
        (nn.BatchNorm3d, MomentumBatchNorm3d),
    ],
)
def test_dimensions_stay(source, target):
    layer = convert_norm(source(4), "mbn")
    assert type(layer) is target
    assert type(convert_norm(layer, "bn")) is source


def test_the_history_of_mbn_begins_as_the_running_statistics():
    layer = convert_norm(randomize(nn.BatchNorm2d(8)), "mbn", base_batch_size=64)
    assert torch.equal(layer.train_mean, layer.running_mean)
    assert torch.equal(layer.train_var, layer.running_var)
    assert layer.train_mean is not layer.running_mean
    assert (layer.stat_momentum, layer.base_batch_size) == (0.0, 64)


def test_bsr_keeps_its_moving_average_on_the_way_to_bn():
    layer = BSRBatchNorm1d(3)
    for _ in range(5):
        layer(torch.randn(4, 3, 6))
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    convert_norm(layer.eval(), "bn")
    assert torch.equal(layer.running_mean, mean)
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(layer(x), (x - mean[:, None]) / (var[:, None] + layer.eps).sqrt())


@pytest.mark.parametrize(
    ("to", "options", "expected"),
    [
        ("gn", {"num_groups": 4}, nn.GroupNorm(4, 8)),
        ("ln", {}, nn.GroupNorm(1, 8)),
        ("in", {}, nn.InstanceNorm2d(8, affine=True)),
        ("gn", {"num_groups": 2, "eps": 1e-2}, nn.GroupNorm(2, 8, eps=1e-2)),
    ],
)
@pytest.mark.parametrize("source", [nn.BatchNorm2d, MomentumBatchNorm2d])
def test_to_norms_without_running_statistics(source, to, options, expected):
    layer = randomize(source(8))
    weight, bias = layer.weight, layer.bias
    converted = convert_norm(layer, to, **options)
    assert type(converted) is type(expected)
    assert repr(converted) == repr(expected).replace("momentum=0.1", "momentum=None")
    assert converted.weight is weight
    assert converted.bias is bias
    assert converted.state_dict().keys() == {"weight", "bias"}
    expected.weight, expected.bias = weight, bias
    x = torch.randn(3, 8, 5, 5)
    assert torch.equal(converted(x), expected(x))


def test_group_norm_has_32_groups_by_default():
    assert convert_norm(nn.BatchNorm2d(64), "gn").num_groups == 32


# what is kept -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "gn"])
def test_parameters_stay_the_same_objects(kind):
    model = small_model()
    model[1].weight.requires_grad_(False)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    convert_norm(model, kind, **({"num_groups": 2} if kind == "gn" else KINDS[kind][1]))
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert not model[1].weight.requires_grad
    before = model[1].bias.clone()
    model(images()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].bias, before)


@pytest.mark.parametrize("kind", [*KINDS, "gn"])
def test_a_missing_bias_stays_missing(kind):
    layer = nn.BatchNorm2d(8)
    layer.register_parameter("bias", None)  # as BatchNorm2d(8, bias=False)
    convert_norm(layer, kind, **({"num_groups": 2} if kind == "gn" else KINDS[kind][1]))
    assert layer.weight is not None
    assert layer.bias is None
    layer(torch.randn(4, 8, 3, 3))
    if kind != "gn":
        assert convert_norm(layer, "bn").bias is None


@pytest.mark.parametrize("kind", [*KINDS, "gn"])
def test_without_affine(kind):
    layer = nn.BatchNorm2d(8, affine=False)
    convert_norm(layer, kind, **({"num_groups": 2} if kind == "gn" else KINDS[kind][1]))
    assert not layer.affine
    assert list(layer.parameters()) == []


def test_modes_stay_layer_by_layer():
    model = small_model()
    model[1].eval()
    convert_norm(model, "bsr")
    assert [model.training, model[1].training, model[3][1].training] == [True, False, True]
    convert_norm(model, "bn")
    assert [model.training, model[1].training, model[3][1].training] == [True, False, True]


@every_kind
def test_hooks_and_their_handles_stay(kind):
    layer = randomize(nn.BatchNorm2d(8))
    calls = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: calls.append(("pre", module))),
        layer.register_forward_hook(
            lambda module, args, kwargs, output: calls.append(("post", module)), with_kwargs=True
        ),
        layer.register_full_backward_hook(lambda module, *grads: calls.append(("backward", module))),
        layer.register_load_state_dict_pre_hook(lambda module, *rest: calls.append(("load", module))),
        layer.register_state_dict_pre_hook(lambda module, *rest: calls.append(("save", module))),
    ]
    convert_norm(layer, kind, **KINDS[kind][1])
    assert calls == []
    layer(torch.randn(4, 8, 3, 3, requires_grad=True)).sum().backward()
    layer.load_state_dict(layer.state_dict())
    assert [call for call, _ in calls] == ["pre", "post", "backward", "save", "load"]
    assert all(module is layer for _, module in calls)
    for handle in handles:
        handle.remove()
    layer(torch.randn(4, 8, 3, 3))
    assert len(calls) == 5


def test_a_tied_layer_stays_one_layer():
    model = small_model()
    model.append(nn.BatchNorm2d(4))
    model.append(model[4])
    convert_norm(model, "mbn")
    assert model[4] is model[5]
    assert type(model[4]) is MomentumBatchNorm2d


def test_references_from_elsewhere_and_what_was_added_stay():
    model = small_model()
    model.layers = (model[1],)  # a tuple, which is no submodule
    model[1].note = "mine"
    model[1].register_buffer("mask", torch.ones(8))
    model[1].register_buffer("temporary", torch.ones(8), persistent=False)
    model[1].register_parameter("gain", nn.Parameter(torch.ones(1)))
    model[1].add_module("probe", nn.Identity())
    for kind in ("bsr", "mbn", "bn"):
        convert_norm(model, kind)
        layer = model.layers[0]
        assert layer is model[1]
        assert layer.note == "mine"
        assert type(layer.probe) is nn.Identity
        assert {"mask", "gain", "weight"} < layer.state_dict().keys()
        assert "temporary" in layer._buffers
        assert "temporary" not in layer.state_dict()


def test_an_attachment_made_before_stays():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, wellcond.FeatureWhitening(stats_every=1, solve_every=1))
    report = handle.report()
    convert_norm(model, "mbn")
    model(images()).square().sum().backward()
    optimizer.step()
    assert handle.report() == report


def test_a_model_compiled_before_runs_the_new_layers():
    model = small_model()
    compiled = torch.compile(model, backend="eager")
    compiled(images())
    convert_norm(compiled, "mbn")
    model[1].stat_momentum = 1.0
    reference = copy.deepcopy(model)
    torch.testing.assert_close(compiled(images()), reference(images()))


@every_kind
def test_copies_pickles_and_casts(kind):
    model, x = convert_norm(small_model(), kind, **KINDS[kind][1]).eval(), images()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert_same_state(other.state_dict(), model.state_dict())
        assert other[1].weight is not model[1].weight
    half = copy.deepcopy(model).bfloat16()
    assert half[1].running_mean.dtype == torch.float32
    assert half(x.bfloat16()).isfinite().all()


@every_kind
def test_a_plain_state_dict_loads_into_a_converted_model(kind):
    source = small_model().eval()
    model = convert_norm(randomize(small_model()), kind, **KINDS[kind][1])
    model.load_state_dict(source.state_dict(), strict=True)
    torch.testing.assert_close(model.eval()(images()), source(images()))


def test_momentum_survives_mbn_which_has_none():
    for momentum in (0.01, None):
        layer = convert_norm(nn.BatchNorm2d(8, momentum=momentum), "mbn")
        assert "momentum" not in repr(layer) or momentum is None
        assert convert_norm(layer, "bn").momentum == momentum


def test_half_precision_statistics_are_rounded_for_torch():
    layer = convert_norm(nn.BatchNorm2d(8).bfloat16(), "mbn")
    layer(torch.randn(4, 8, 3, 3).bfloat16())
    mean = layer.running_mean.clone()
    assert not torch.equal(mean, mean.bfloat16())
    convert_norm(layer.eval(), "bn")
    assert torch.equal(layer.running_mean, mean.bfloat16())
    layer(torch.randn(4, 8, 3, 3).bfloat16())


def test_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.BatchNorm2d(8))
    for kind, (_, options) in KINDS.items():
        assert all(tensor.is_meta for tensor in convert_norm(model, kind, **options).state_dict().values())
        convert_norm(model, "bn")


def test_group_size_and_synchronize_go_with_the_layer():
    layer = convert_norm(nn.BatchNorm2d(8), "mbn", group_size=4)
    assert convert_norm(layer, "bsr").group_size == 4
    assert convert_norm(layer, "ghost").group_size == 4
    assert convert_norm(layer, "evalnorm", group_size=None).group_size is None
    layer = convert_norm(nn.BatchNorm2d(8), "bsr", synchronize=True)
    assert convert_norm(layer, "mbn").synchronize is True


# the kind that it is already ----------------------------------------------------------------------------------------


def test_the_same_kind_without_options_changes_nothing():
    for model in (small_model(), convert_norm(small_model(), "mbn")):
        before = snapshot(model)
        convert_norm(model, "bn" if type(model[1]) is nn.BatchNorm2d else "mbn")
        assert snapshot(model) == before


def test_the_same_kind_with_options_keeps_the_state():
    layer = MomentumBatchNorm2d(8, base_inference_decay=0.9, group_size=2)
    layer.stat_momentum = 0.5
    layer(torch.randn(4, 8, 3, 3))
    state = copy.deepcopy(layer.state_dict())
    convert_norm(layer, "mbn", base_batch_size=64)
    assert_same_state(layer.state_dict(), state)
    assert (layer.base_batch_size, layer.base_inference_decay, layer.group_size) == (64, 0.9, 2)

    layer = BSRBatchNorm2d(8)
    for _ in range(5):
        layer(torch.randn(4, 8, 3, 3))
    state = copy.deepcopy(layer.state_dict())
    convert_norm(layer.eval(), "bsr", nonneg="nnls")
    assert_same_state(layer.state_dict(), state)
    reference = BSRBatchNorm2d(8, nonneg="nnls")
    reference.load_state_dict(state)
    x = torch.randn(2, 8, 3, 3)
    assert torch.equal(layer(x), reference.eval()(x))

    layer = convert_norm(BatchRenorm2d(8, r_max=2.0, d_max=1.0), "brn", r_max=4.0)
    assert (layer.r_max, layer.d_max) == (4.0, 1.0)
    assert convert_norm(nn.BatchNorm2d(8), "bn", momentum=0.01, eps=1e-3).momentum == 0.01


def test_explicit_options_win_over_the_layer():
    layer = convert_norm(randomize(nn.BatchNorm2d(8)), "bsr", affine=False, momentum=0.5, eps=0.1)
    assert (layer.weight, layer.affine, layer.momentum, layer.eps) == (None, False, 0.5, 0.1)
    layer = convert_norm(nn.BatchNorm2d(8, affine=False, track_running_stats=False).double(), "bn", affine=True)
    assert layer.weight.shape == (8,)
    layer = convert_norm(nn.BatchNorm2d(8, track_running_stats=False), "bn", track_running_stats=True)
    assert layer.running_mean.shape == (8,)
    assert type(convert_norm(layer, "mbn")) is MomentumBatchNorm2d


# which layers -------------------------------------------------------------------------------------------------------


def test_where_gets_qualified_names_and_modules():
    model = small_model()
    seen = []
    convert_norm(model, "mbn", where=lambda name, module: seen.append((name, module)) or name.startswith("3."))
    assert seen == [("1", model[1]), ("3.1", model[3][1])]
    assert [type(layer) for layer in batch_norms(model)] == [nn.BatchNorm2d, MomentumBatchNorm2d]
    layer = nn.BatchNorm2d(8)
    convert_norm(layer, "mbn", where=lambda name, module: name == "" and module is layer)


def test_where_must_not_divide_a_tied_layer():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
    model.append(model[0])
    with pytest.raises(TypeError, match=re.escape("'0': BatchNorm2d is one layer under the names '0', '2', of which")):
        convert_norm(model, "mbn", where=lambda name, module: name == "2")
    assert type(model[0]) is nn.BatchNorm2d


def test_nothing_to_convert():
    with pytest.raises(ValueError, match=r"Linear has no batch normalization to convert; .* none at all"):
        convert_norm(nn.Linear(2, 2), "mbn")
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.LayerNorm(4), nn.InstanceNorm2d(4))
    with pytest.raises(ValueError, match="its normalizations are: 1 GroupNorm, 2 LayerNorm, 1 InstanceNorm2d"):
        convert_norm(model, "bn")
    with pytest.raises(
        ValueError, match=re.escape("`where` selects none of the model's 2 batch normalizations ('1', …)")
    ):
        convert_norm(small_model(), "mbn", where=lambda name, module: False)


# refusals -----------------------------------------------------------------------------------------------------------


class BatchNormOfMine(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


class MomentumOfMine(MomentumBatchNorm2d):
    pass


def parametrized():
    return parametrizations.weight_norm(nn.BatchNorm2d(8).requires_grad_(), dim=0)


def pruned():
    return prune.l1_unstructured(nn.BatchNorm2d(8), "weight", amount=2)


def patched():
    layer = nn.BatchNorm2d(8)
    layer.forward = lambda input: input
    return layer


def cut():
    layer = nn.BatchNorm2d(8)
    layer.weight, layer.bias = nn.Parameter(layer.weight[:4]), nn.Parameter(layer.bias[:4])
    return layer


def frozen_statistics():
    layer = nn.BatchNorm2d(8)
    layer.track_running_stats = False
    return layer


REFUSED = {
    "subclass": (lambda: BatchNormOfMine(8), "BatchNormOfMine is a subclass of BatchNorm2d that is not known"),
    "our subclass": (
        lambda: MomentumOfMine(8),
        "MomentumOfMine is a subclass of MomentumBatchNorm2d that is not known",
    ),
    "lazy": (nn.LazyBatchNorm2d, "LazyBatchNorm2d has no parameters yet: run the model once first"),
    "synchronized": (lambda: nn.SyncBatchNorm(8), "convert before nn.SyncBatchNorm.convert_sync_batchnorm"),
    "parametrized": (parametrized, "is parametrized: remove the parametrization first"),
    "pruned": (pruned, "computes its 'weight' (as pruning does): make that permanent first"),
    "patched": (patched, "has its own 'forward', set on this one object"),
    "cut": (cut, "says that it has 8 features, but its weight has shape [4]"),
    "frozen": (frozen_statistics, "has track_running_stats=False, which contradicts its buffers"),
    "untracked": (
        lambda: nn.BatchNorm2d(8, track_running_stats=False),
        "has no running statistics (track_running_stats=False), which MomentumBatchNorm2d needs",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_layer_and_change_nothing(case):
    make, reason = REFUSED[case]
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ModuleDict({"norm": make()}), nn.BatchNorm2d(8))
    before = snapshot(model)
    with pytest.raises(TypeError, match=re.escape("'1.norm': ") + ".*" + re.escape(reason)) as caught:
        convert_norm(model, "mbn")
    assert "convert_norm(to='mbn') cannot convert these layers, and changed none" in str(caught.value)
    assert snapshot(model) == before
    # Left out, it is no obstacle.
    convert_norm(model, "mbn", where=lambda name, module: name != "1.norm")
    assert type(model[1]["norm"]) is before[3][1]
    assert [type(model[0]), type(model[2])] == [MomentumBatchNorm2d] * 2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ghost"])
def test_layers_without_running_statistics(kind):
    with pytest.raises(TypeError, match="the model itself: BatchNorm2d has no running statistics"):
        convert_norm(nn.BatchNorm2d(8, track_running_stats=False), kind, **KINDS.get(kind, (None, {}))[1])
    ghost = convert_norm(nn.BatchNorm2d(8, track_running_stats=False), "ghost", group_size=2)
    assert ghost.running_mean is None
    assert convert_norm(ghost, "gn", num_groups=2).num_groups == 2


def test_all_offenders_are_in_one_error():
    model = nn.Sequential(BatchNormOfMine(8), nn.BatchNorm2d(8), BatchNormOfMine(8), nn.LazyBatchNorm2d())
    with pytest.raises(TypeError) as caught:
        convert_norm(model, "bn")
    assert "'0', '2': BatchNormOfMine" in str(caught.value)
    assert "'3': LazyBatchNorm2d" in str(caught.value)


def test_channels_that_cannot_be_grouped():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(12), nn.BatchNorm2d(20))
    with pytest.raises(
        ValueError, match=re.escape("\n  '1': num_groups=8 does not divide 12 channels\n  '2': num_groups=8")
    ):
        convert_norm(model, "gn", num_groups=8)
    assert {type(layer) for layer in model} == {nn.BatchNorm2d}
    with pytest.raises(ValueError, match="num_groups must be a positive integer, got 0"):
        convert_norm(model, "gn", num_groups=0)


def test_options_are_checked():
    model = small_model()
    before = snapshot(model)
    with pytest.raises(
        TypeError, match=re.escape("convert_norm(to='ln') takes the options 'eps', 'affine', got 'num_groups'")
    ):
        convert_norm(model, "ln", num_groups=2)
    with pytest.raises(TypeError, match=r"to='mbn'\) takes the options .*'base_batch_size'.*, got 'group', 'momentum'"):
        convert_norm(model, "mbn", group=2, momentum=0.1)
    with pytest.raises(TypeError, match="'1', '3.1': GhostBatchNorm2d needs the option 'group_size'"):
        convert_norm(model, "ghost")
    with pytest.raises(ValueError, match="'1', '3.1': group_size must be a positive integer, got -1"):
        convert_norm(model, "ghost", group_size=-1)
    with pytest.raises(ValueError, match=r"to must be one of 'bn', 'ghost', .*, got 'syncbn'"):
        convert_norm(model, "syncbn")
    with pytest.raises(ValueError, match="where must be a predicate of \\(name, module\\) or None, got '1'"):
        convert_norm(model, "mbn", where="1")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        convert_norm([model], "mbn")
    assert snapshot(model) == before


def test_an_odd_momentum_is_refused_by_name():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8, momentum=1.5))
    with pytest.raises(ValueError, match=re.escape("'1': momentum must lie in [0, 1] or be None, got 1.5")):
        convert_norm(model, "bsr")
    assert type(model[0]) is nn.BatchNorm2d


def test_other_normalizations_are_left_alone():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.InstanceNorm2d(8), nn.GroupNorm(2, 8))
    others = snapshot(model[1:])
    convert_norm(model, "mbn")
    assert snapshot(model[1:]) == others


# models -------------------------------------------------------------------------------------------------------------


def torchvision_model(name):
    return pytest.importorskip("torchvision").models.get_model(name, weights=None, num_classes=10)


def timm_model(name):
    return pytest.importorskip("timm").create_model(name, num_classes=10)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (torchvision_model, "resnet50"),
        (torchvision_model, "vgg16_bn"),
        (torchvision_model, "densenet121"),
        (torchvision_model, "mobilenet_v3_large"),
        (timm_model, "resnet50"),
        (timm_model, "vgg16_bn"),
        (timm_model, "densenet121"),
        (timm_model, "mobilenetv3_large_100"),
    ],
)
@torch.no_grad()
def test_known_models(make, name):
    torch.manual_seed(0)
    model = make(name).eval()
    x = torch.randn(2, 3, 64, 64)
    kinds = [type(layer) for layer in batch_norms(model)]
    fresh = model.state_dict()
    pretrained = {key: value.clone() for key, value in randomize(model).state_dict().items() if value.numel() < 10_000}
    expected = model(x)
    keys = list(fresh)

    convert_norm(model, "mbn")
    assert torch.equal(model(x), expected)
    convert_norm(model, "bsr")
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert all(isinstance(layer, StatisticsNorm) for layer in batch_norms(model))
    for layer in batch_norms(model):
        layer.running_mean.zero_()
    model.load_state_dict(fresh | pretrained, strict=True)

    convert_norm(model, "bn")
    assert torch.equal(model(x), expected)
    assert [type(layer) for layer in batch_norms(model)] == kinds
    assert list(model.state_dict()) == keys


class TestTimmLayersWithAnActivation:
    @pytest.fixture
    def model(self):
        norm_act = pytest.importorskip("timm.layers.norm_act")
        torch.manual_seed(0)
        norm = norm_act.BatchNormAct2d(8, act_layer=nn.SiLU, drop_layer=nn.Dropout, inplace=False)
        return randomize(nn.Sequential(nn.Conv2d(3, 8, 3), norm)).eval()

    @pytest.mark.parametrize("kind", [*KINDS, "gn", "ln", "in"])
    def test_dropout_and_activation_stay(self, model, kind):
        drop, act = model[1].drop, model[1].act
        options = {"gn": {"num_groups": 2}, "ln": {}, "in": {}}.get(kind) or KINDS.get(kind, (None, {}))[1]
        plain = nn.Sequential(model[0], nn.BatchNorm2d(8), nn.SiLU())
        plain[1].load_state_dict(model[1].state_dict())
        convert_norm(model, kind, **options)
        convert_norm(plain.eval(), kind, **options)
        x = images()
        assert torch.equal(model(x), plain(x))
        assert model[1].drop is drop
        assert model[1].act is act
        if kind in KINDS:
            model.train()
            plain.train()
            drop.eval()
            assert torch.equal(model(x), plain(x))
            drop.train()
            assert (model(x) == 0).float().mean() > 0.3

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_activation_may_work_in_place(self, model, kind):
        convert_norm(model.train(), kind, **KINDS[kind][1])
        model[1].drop.eval()
        gradients = []
        for layer, inplace in ((copy.deepcopy(model), False), (model, True)):
            layer[1].act.inplace = inplace
            layer(images()).square().sum().backward()
            gradients.append(layer[0].weight.grad)
        assert torch.equal(*gradients)

    @pytest.mark.parametrize("kind", [*KINDS, "gn"])
    def test_copies_and_pickles(self, model, kind):
        convert_norm(model, kind, **({"num_groups": 2} if kind == "gn" else KINDS[kind][1]))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), pickle.loads(pickle.dumps(model, 1))):
            assert type(other[1]) is type(model[1])
            assert torch.equal(other(images()), model(images()))
            assert_same_state(other.state_dict(), model.state_dict())

    def test_it_stays_one_of_timm_and_becomes_it_again(self, model):
        original = type(model[1])
        expected, state = model(images()), copy.deepcopy(model.state_dict())
        convert_norm(model, "mbn", base_batch_size=64)
        assert isinstance(model[1], original)
        assert isinstance(model[1], MomentumBatchNorm2d)
        assert type(model[1]).__name__ == "MomentumBatchNormAct2d"
        assert convert_norm(model, "mbn") is model
        convert_norm(model, "mbn", base_batch_size=16)
        assert model[1].base_batch_size == 16
        convert_norm(model, "ghost", group_size=2)
        convert_norm(model, "bn")
        assert type(model[1]) is original
        assert torch.equal(model(images()), expected)
        assert_same_state(model.state_dict(), state)
        assert convert_norm(model, "bn", momentum=0.01)[1].momentum == 0.01
        assert type(model[1]) is original

    def test_its_subclasses_are_refused(self, model):
        class Mine(type(model[1])):
            pass

        model[1].__class__ = Mine
        with pytest.raises(TypeError, match="'1': Mine is a subclass of BatchNormAct2d that is not known"):
            convert_norm(model, "mbn")
        model[1].__class__ = Mine.__mro__[1]
        model[1].__class__ = type("Mine", (type(convert_norm(model, "mbn")[1]),), {})
        with pytest.raises(TypeError, match="'1': Mine is a subclass of MomentumBatchNormAct2d that is not known"):
            convert_norm(model, "bn")
