"""What a recipe may say, how it is found, and what its panels and scales become."""

from __future__ import annotations

from pathlib import Path

import pytest

from wellcond.lab.data.named_data import NAMED_DATA, bind_data
from wellcond.lab.errors import LabError
from wellcond.lab.methods.method import select_methods
from wellcond.lab.reproduction.panels import needed_data, scaled_panels
from wellcond.lab.reproduction.recipe import bundled_recipes, find_recipe, load_recipe
from wellcond.lab.trials import make_trials

RECIPE = """\
title = "Two ways"
source = "a paper, table 9.1"
names = ["9.1", "9.2"]
score = "accuracy"
baseline = "plain"

[settings]
data = "cifar100"
model = "resnet18"
epochs = 200
batch_size = 128

[[method]]
label = "plain"
method = "SGDM"
lrs = [0.1]
options = { weight_decay = 1e-4 }

[[method]]
label = "white"
method = "W-SGDM"
lrs = [0.1]
transform = { damping = 0.1 }

[[panel]]
name = "first"
paper = { plain = [76.87, 0.26], white = 78.82 }

[[panel]]
name = "second"
settings = { model = "resnet8", ghost_batch = 2 }
change = { "*" = { options = { weight_decay = 1e-3 } }, white = { lrs = [0.5], transform = { damping = 0.2 } } }
paper = { plain = [50] }

[scale.small]
settings = { data = "cifar10-jpeg", epochs = 8 }
models = { resnet18 = "convnet" }
lrs = { SGD = [0.2, 0.02, 0.06] }

[scale.smoke]
settings = { data = "digits", model = "convnet", epochs = 1 }
panels = ["second"]
methods = ["plain"]
lrs = { SGD = [0.3], plain = [0.4] }
"""


@pytest.fixture
def write(tmp_path):
    """The function that writes a recipe, a part of it replaced."""

    def write(old: str = "", new: str = "") -> Path:
        assert old in RECIPE
        file = tmp_path / "own.toml"
        file.write_text(RECIPE.replace(old, new, 1) if old else RECIPE)
        return file

    return write


def test_the_full_scale_is_the_recipe_itself(write):
    recipe = load_recipe(write())
    first = scaled_panels(recipe, "full")[0]
    settings = first.settings({"cifar100": "/data/c100"}, jobs=2, seeds=7)
    assert (settings.data, settings.model, settings.epochs, settings.batch_size) == ("/data/c100", "resnet18", 200, 128)
    assert (settings.methods, settings.jobs, settings.seeds) == (
        tuple(method.written() for method in first.methods),
        2,
        7,
    )
    plain, white = select_methods(settings.methods)
    assert (plain.name, plain.lrs, dict(plain.options)) == ("plain", (0.1,), {"momentum": 0.9, "weight_decay": 1e-4})
    assert (white.name, white.baseline) == ("white", "plain")
    assert dict(white.transforms[0].options) == {"damping": 0.1}
    assert first.differs == {}
    assert first.table.paper == {"plain": (76.87, 0.26), "white": (78.82, None)}


def test_a_panel_changes_what_is_special_to_it(write):
    second = scaled_panels(load_recipe(write()), "full")[1]
    settings = second.settings({"cifar100": "x"}, jobs=1, seeds=None)
    assert (settings.model, settings.ghost_batch) == ("resnet8", 2)
    plain, white = select_methods(settings.methods)
    assert (plain.lrs, white.lrs) == ((0.1,), (0.5,))
    assert dict(plain.options)["weight_decay"] == dict(white.options)["weight_decay"] == 1e-3
    assert dict(white.transforms[0].options) == {"damping": 0.2}


def test_a_scale_changes_sizes_and_says_which(write):
    recipe = load_recipe(write())
    first, second = scaled_panels(recipe, "small")
    assert [method.lrs for method in first.methods] == [(0.02, 0.06, 0.2)] * 2
    assert first.fields["model"] == "convnet"
    assert second.fields["model"] == "resnet8"  # not in its map
    assert second.fields["ghost_batch"] == 2
    assert first.differs == {
        "data": ("cifar100", "cifar10-jpeg"),
        "epochs": (200, 8),
        "model": ("resnet18", "convnet"),
    }
    (only,) = scaled_panels(recipe, "smoke")
    assert (only.table.name, [method.name for method in only.methods]) == ("second", ["plain"])
    assert only.methods[0].lrs == (0.4,)  # its own grid goes before its optimizer's
    assert needed_data([first, only]) == ["cifar10-jpeg", "digits"]


def test_a_scale_can_take_a_setting_away(write):
    file = write("epochs = 8 }", 'epochs = 8, model = "" }')
    panel = scaled_panels(load_recipe(file), "small")[0]
    assert "model" not in panel.fields
    assert panel.differs["model"] == ("resnet18", None)


def test_a_recipe_sweeps_options_and_a_scale_has_its_own(write):
    sweeps = "epochs = 200\nsweeps = { weight_decay = [1e-4, 5e-4], momentum = [0.9] }"
    recipe = load_recipe(write("epochs = 200", sweeps))
    first, _ = scaled_panels(recipe, "full")
    settings = first.settings({"cifar100": "x"}, jobs=1, seeds=None)
    assert settings.sweeps == (("weight_decay", (1e-4, 5e-4)), ("momentum", (0.9,)))
    assert make_trials(select_methods(settings.methods), settings.sweeps)["plain"][1].swept[0] == ("weight_decay", 5e-4)
    small = 'settings = { data = "cifar10-jpeg", epochs = 8'
    for own, expected in (("{ damping = [1, 2] }", (("damping", (1, 2)),)), ("{}", ())):
        file = write("epochs = 200", sweeps)
        file.write_text(file.read_text().replace(small, f"{small}, sweeps = {own}"))
        panel = scaled_panels(load_recipe(file), "small")[0]
        assert panel.settings({"cifar10-jpeg": "x"}, jobs=1, seeds=None).sweeps == expected
        assert panel.differs["sweeps"][0] == {"weight_decay": [1e-4, 5e-4], "momentum": [0.9]}


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        ("{ lr = [0.1] }", "--lrs gives the grid of the lr"),
        ("{ damping = [] }", "--sweep damping must have at least one value"),
        ("{ damping = [1, 2, 1] }", "--sweep damping=1,2,1: names a value twice"),
    ],
)
def test_what_cannot_be_swept_is_told(write, sweeps, message):
    panel = scaled_panels(load_recipe(write("epochs = 200", f"epochs = 200\nsweeps = {sweeps}")), "full")[0]
    with pytest.raises(LabError, match=message):
        panel.settings({"cifar100": "x"}, jobs=1, seeds=None)


def test_what_is_asked_for_goes_before_the_scale(write):
    recipe = load_recipe(write())
    (panel,) = scaled_panels(recipe, "smoke", panels=["first"], methods=["white"])
    assert (panel.table.name, [method.name for method in panel.methods]) == ("first", ["white"])
    with pytest.raises(LabError, match=r"unknown panel of 9\.1 'frist': did you mean 'first'\? Known: first, second"):
        scaled_panels(recipe, "small", panels=["frist"])
    with pytest.raises(LabError, match=r"unknown method of 9\.1 'whit': did you mean 'white'\? Known: plain, white"):
        scaled_panels(recipe, "small", methods=["whit"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("source =", "sorce =", "unknown key 'sorce': did you mean 'source'?"),
        ("epochs = 200", "epoch = 200", "settings: unknown key 'epoch': did you mean 'epochs'?"),
        ("epochs = 200", 'epochs = "200"', "settings.epochs: Input should be a valid integer"),
        ("epochs = 200", "jobs = 2", "settings: unknown key 'jobs'"),
        ("transform = {", "transforms = {", "method.1: unknown key 'transforms': did you mean 'transform'?"),
        ('method = "W-SGDM"', 'method = "W-SDGM"', "unknown method 'W-SDGM': did you mean 'W-SGDM'?"),
        ('label = "white"', 'label = "plain"', "each method must have a name of its own, got 'plain' twice"),
        ('name = "second"', 'name = "first"', "each panel must have a name of its own, got 'first' twice"),
        ('name = "second"', 'name = "a, b"', "a name of a panel must have no comma, since commands list names with"),
        ('baseline = "plain"', 'baseline = "plane"', "unknown label 'plane': did you mean 'plain'?"),
        ("paper = { plain = [50]", "paper = { plane = [50]", "unknown label 'plane': did you mean 'plain'?"),
        ("[50]", "[50, 1, 2]", "panel.1.paper.plain: a figure of the source must be [mean, std], [mean] or a number"),
        ("{ SGD = [0.2", "{ SDG = [0.2", "unknown label or optimizer 'SDG': did you mean 'SGD'?"),
        ("lrs = [0.1]", "lrs = [-0.1]", "method.0.lrs.0: Input should be greater than 0"),
        ('panels = ["second"]', 'panels = ["third"]', "unknown panel 'third'"),
        ('score = "accuracy"', 'score = "beauty"', "score: Input should be 'accuracy'"),
        ("[scale.small]", "[scale.tiny]", "scale: unknown key 'tiny'"),
        (
            'score = "accuracy"',
            'score = "disparity"',
            "panel first must have a figure if, and only if,",
        ),
        (
            "epochs = 200",
            'probe = "disparity"',
            "a score that a probe measures needs settings.probe to",
        ),
        ("[settings]", "[settings", "not TOML: "),
    ],
)
def test_mistakes_name_the_file_the_place_and_what_was_meant(write, old, new, message):
    with pytest.raises(LabError) as caught:
        load_recipe(write(old, new))
    assert str(caught.value).startswith(f"recipe own.toml: {message}")
    assert "\n" not in str(caught.value)


def test_options_that_a_method_cannot_take_are_told(write):
    recipe = load_recipe(write("transform = { damping = 0.1 }", "transform = { dampening = 0.1 }"))
    with pytest.raises(LabError, match="method white: unknown transform option 'dampening': did you mean 'damping'"):
        scaled_panels(recipe, "full")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(LabError, match=r"none\.toml: there is no such file"):
        find_recipe(str(tmp_path / "none.toml"))


def test_a_recipe_of_ones_own_is_found_by_its_file(write):
    assert find_recipe(str(write())).names == ["9.1", "9.2"]


@pytest.mark.parametrize("name", ["4.1", "table 4.1", "Table-4.1", " TABLE_4.1 "])
def test_tables_are_found_as_a_reader_would_call_them(name):
    assert find_recipe(name).source == "thesis, table 4.1"


def test_of_a_table_and_a_figure_of_one_number_the_table_needs_no_name():
    assert find_recipe("3.3").source == find_recipe("table 3.3").source == "thesis, table 3.3"
    assert find_recipe("figure 3.3").source == find_recipe("fig. 3.3").source == "thesis, figure 3.3"


@pytest.mark.parametrize("name", ["2.4", "figure 2.4", "fig. 2.4", "Fig-2.4"])
def test_so_are_figures(name):
    assert find_recipe(name).source == "thesis, figure 2.4"


def test_an_unknown_table_names_the_nearest():
    with pytest.raises(LabError, match=r"unknown table '4\.11': did you mean '4\.1'\? Known: "):
        find_recipe("4.11")


def test_recipes_are_in_the_order_of_their_numbers():
    tables = [recipe.name for recipe in bundled_recipes() if recipe.name.startswith("6.")]
    assert tables == sorted(tables, key=lambda name: int(name.partition(".")[2]))
    assert tables[-1] == "6.11"


def test_no_two_recipes_share_a_name_and_all_data_are_known():
    names, data = [], set()
    for recipe in bundled_recipes():
        names += recipe.names
        for scale in ("smoke", "small", "full"):
            data |= set(needed_data(scaled_panels(recipe, scale)))
    assert len(names) == len(set(names))
    assert data <= set(NAMED_DATA)


def test_every_method_gets_equally_many_lrs():
    for recipe in bundled_recipes():
        for scale in ("smoke", "small", "full"):
            for panel in scaled_panels(recipe, scale):
                counts = {len(method.lrs) for method in panel.methods}
                assert len(counts) == 1, (recipe.name, scale, panel.table.name)


def test_data_are_bound_to_paths(monkeypatch, tmp_path):
    monkeypatch.delenv("WELLCOND_DATA", raising=False)
    assert bind_data(["cifar10=/a", "cifar100=/b=c"], ["cifar100", "digits"]) == {
        "cifar100": "/b=c",
        "digits": "digits",
    }
    assert bind_data(["/a"], ["cifar10"]) == {"cifar10": "/a"}
    (tmp_path / "cifar10").mkdir()
    monkeypatch.setenv("WELLCOND_DATA", str(tmp_path))
    assert bind_data([], ["cifar10"]) == {"cifar10": str(tmp_path / "cifar10")}
    assert bind_data(["cifar10=/a"], ["cifar10"]) == {"cifar10": "/a"}  # said goes before found


@pytest.mark.parametrize(
    ("given", "needed", "line"),
    [
        ([], ["cifar10"], f"--data cifar10=PATH must say where the data lie: {NAMED_DATA['cifar10']}"),
        (["cifar11=/a"], ["cifar10"], "unknown data 'cifar11': did you mean 'cifar10'?"),
        (["/a"], ["cifar10", "cifar100"], "--data must look like NAME=PATH for each of cifar10, cifar100, got '/a'"),
        (["cifar10=/a", "cifar10=/b"], ["cifar10"], "--data must give each data set once, got cifar10 twice"),
        (["cifar10="], ["cifar10"], "--data must look like NAME=PATH, got 'cifar10='"),
    ],
)
def test_data_that_are_not_there_are_one_clear_line(monkeypatch, given, needed, line):
    monkeypatch.delenv("WELLCOND_DATA", raising=False)
    with pytest.raises(LabError) as caught:
        bind_data(given, needed)
    assert str(caught.value).startswith(line)
