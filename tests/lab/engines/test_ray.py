"""Runs spread by Ray: the numbers of local ones, lost workers' runs begun again, failures said plainly."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from image_sets import write_class_folders

from wellcond.__main__ import main
from wellcond.lab.engines import select as engine
from wellcond.lab.engines.select import RunFailedError
from wellcond.lab.errors import DataError, LabError
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.records import RunStore
from wellcond.lab.runs.settings import Settings

SMALL = ["compare", "--train-images", "64", "--epochs", "1", "--seeds", "1", "--methods", "SGDM", "--quiet"]


def test_without_ray_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*SMALL, "--engine", "ray"]) == 2
    error = "wellcond: error: --engine ray needs Ray, which is not installed: pip install 'wellcond[ray]'\n"
    assert capsys.readouterr().err == error


def test_an_address_without_ray_is_refused():
    with pytest.raises(LabError, match="--ray-address is for --engine ray only"):
        Settings(ray_address="auto")


def test_an_unknown_engine_is_refused():
    with pytest.raises(LabError, match="rey.*ray"):
        Settings(engine="rey")


def test_an_address_where_nobody_listens_is_refused_at_once(tmp_path, capsys):
    pytest.importorskip("ray")
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # bound, and not listening: nobody else takes it meanwhile
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        assert main([*SMALL, "--engine", "ray", "--ray-address", address, "--out", str(tmp_path)]) == 2
    error = f"wellcond: error: --engine ray: there is no Ray cluster at the address '{address}': "
    assert capsys.readouterr().err.startswith(error)


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of two workers on this machine."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        # On a busy machine workers take minutes to start, and Ray kills them where others leave little memory.
        patch.setenv("RAY_worker_register_timeout_seconds", "900")
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        for left in reversed(range(5)):
            try:
                ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
                break
            except Exception:  # it waits half a minute for its own processes, and no longer
                ray.shutdown()
                if not left:
                    raise
        yield
        ray.shutdown()


@pytest.fixture
def plan(cluster):
    return make_plan(Settings(methods=("SGDM",), seeds=1, epochs=1, train_images=64, engine="ray"))


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path)


def numbers(records):
    return {
        spec: [(epoch.steps, epoch.train_loss, epoch.test_score, epoch.test_loss) for epoch in record.epochs]
        for spec, record in records
    }


def test_runs_give_the_numbers_of_local_ones(plan, store):
    local = make_plan(Settings(methods=("SGDM",), seeds=1, epochs=1, train_images=64))
    assert local.specs() == plan.specs()  # what is kept by one engine, the other need not repeat
    expected = numbers(engine.execute(local, local.specs(), store))
    assert numbers(engine.execute(plan, plan.specs(), store)) == expected
    assert len(expected) == 3


def test_the_run_of_a_lost_worker_is_begun_again(plan, store, monkeypatch, tmp_path):
    from wellcond.lab.engines import ray as ray_cluster

    work, mark = ray_cluster._work, str(tmp_path / "lost")

    def lost_once(*arguments):
        if not Path(mark).exists():
            Path(mark).touch()
            os._exit(1)
        return work(*arguments)

    monkeypatch.setattr(ray_cluster, "_work", lost_once)
    records = dict(engine.execute(plan, plan.specs()[:1], store))
    assert Path(mark).exists()
    assert numbers(records.items()) == numbers(engine.execute(plan, plan.specs()[:1], store))


def test_a_run_that_raises_is_reported_with_its_traceback(plan, store):
    spec = replace(plan.specs()[0], model="resnet8000")
    with pytest.raises(RunFailedError, match=r"(?s)the run SGDM lr 0.03 seed 0 .*Traceback.*resnet8000"):
        list(engine.execute(plan, [spec], store))


def test_a_broken_file_is_named_in_one_line(cluster, store, tmp_path):
    root = write_class_folders(tmp_path / "images")
    broken = root / "train" / "n01" / "train_2.png"
    content = bytearray(broken.read_bytes())
    content[len(content) // 2] ^= 255  # its ends are whole, so that only who decodes it finds out
    broken.write_bytes(content)
    given = {"data": str(root), "model": "convnet", "methods": ("SGDM",), "batch_size": 4, "epochs": 1, "seeds": 1}
    plan = make_plan(Settings(**given, image_size=16, train_images=16, validation_images=4, engine="ray"))
    with pytest.raises(DataError, match=rf"^--data: {broken} cannot be decoded[^\n]*$"):
        list(engine.execute(plan, plan.specs()[:1], store))


def test_other_data_on_a_worker_is_refused(plan, store):
    spec = replace(plan.specs()[0], data="other")
    with pytest.raises(RunFailedError, match="the data in digits on its worker is not the data here"):
        list(engine.execute(plan, [spec], store))


def test_a_run_that_no_machine_has_room_for_is_refused(plan, store):
    with pytest.raises(LabError, match="a run takes 64 CPUs.*no machine of the cluster has more than 2"):
        list(engine.execute(replace(plan, threads=64), plan.specs(), store))
