"""Pickles of data are read, and nothing in them is run."""

from __future__ import annotations

import codecs
import collections
import contextlib
import os
import pickle
import pickletools
import subprocess
from pathlib import Path

import numpy as np
import pytest
from image_sets import write_cifar

from wellcond.lab.data.load import load_data
from wellcond.lab.data.plain_pickle import read_plain_pickle
from wellcond.lab.errors import LabError

CONTENT = {
    "data": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big": np.arange(3, dtype=">i4"),
    "empty": np.empty((0, 3072), dtype=np.uint8),
    "mask": np.array([True, False]),
    "labels": [0, 1, -7, 2**70],
    "names": ["ä", b"bytes", 0.5, None, True, 1j],
    "scalar": np.int64(3),
    "nested": [{"a": ({"b": [np.float32(0.5)]},)}],
}


def same(read: object, written: object) -> bool:
    if isinstance(written, dict):
        return read.keys() == written.keys() and all(same(read[key], written[key]) for key in written)
    if isinstance(written, (list, tuple)):
        return len(read) == len(written) and all(map(same, read, written))
    if isinstance(written, np.ndarray):
        return read.dtype == written.dtype and np.array_equal(read, written)
    return read == written


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_content_comes_back(tmp_path, protocol):
    (tmp_path / "file").write_bytes(pickle.dumps(CONTENT, protocol))
    assert same(read_plain_pickle(tmp_path / "file"), CONTENT)


def test_files_of_python_2_and_old_numpy(tmp_path):
    written = pickle.dumps({"data": np.arange(4, dtype=np.uint8)}, 2).replace(b"numpy._core", b"numpy.core")
    (tmp_path / "file").write_bytes(written)
    assert same(read_plain_pickle(tmp_path / "file"), {"data": np.arange(4, dtype=np.uint8)})
    # Python 2's str, in which CIFAR's own files hold the pixels.
    raw = b"cnumpy\nndarray\n(I0\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
    raw = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\nt"
        + raw.partition(b"I0\nt")[2]
        + b"I00\nU\x02\xff\x01tb."
    )
    (tmp_path / "file").write_bytes(raw)
    assert read_plain_pickle(tmp_path / "file").tolist() == [255, 1]


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(mark: Path) -> dict[str, bytes]:
    """Return pickles that make a file, or would reach a function, when plain `pickle` reads them."""
    opcode = f"cos\nsystem\n(S'touch {mark}'\ntR.".encode()
    return {
        "os.system": pickle.dumps({"data": Calls(os.system, f"touch {mark}")}),
        "subprocess": pickle.dumps([Calls(subprocess.call, ["touch", str(mark)])]),
        "eval": pickle.dumps({"a": Calls(eval, f"open({str(mark)!r}, 'w')")}),
        "by opcode": opcode,
        "after an array": pickle.dumps([np.arange(3), Calls(exec, f"open({str(mark)!r}, 'w')")], 2),
        "in an array": pickle.dumps(np.array([Calls(eval, f"open({str(mark)!r}, 'w')")], dtype=object)),
        "an array of objects": pickle.dumps(np.array([None], dtype=object)),
        "another encoding": pickle.dumps(Calls(codecs.encode, "00", "hex")),
        "a container": pickle.dumps(collections.OrderedDict(a=1)),
        "a set": pickle.dumps({1, 2}),
        "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0ddtype.__new__\x93.",
        "a function's attributes": b"c_codecs\nencode\n(NI0\nS'x'\n(S'__defaults__'\nNdtb.",
        "an extension": b"\x82\x01.",
        "something outside": b"Pname\n.",
        "itself": b"]\x94q\x00h\x00a.",
    }


@pytest.mark.parametrize("kind", sorted(hostile(Path())))
def test_nothing_is_run(tmp_path, kind):
    mark = tmp_path / "mark"
    (tmp_path / "file").write_bytes(hostile(mark)[kind])
    with pytest.raises(LabError) as refused:
        read_plain_pickle(tmp_path / "file")
    assert not mark.exists()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("classes", [10, 100])
def test_a_prepared_cifar_runs_nothing(tmp_path, classes):
    write_cifar(tmp_path, classes)
    mark = tmp_path / "mark"
    for file in sorted((tmp_path / ("cifar-10-batches-py" if classes == 10 else "cifar-100-python")).iterdir()):
        good = file.read_bytes()
        for bad in hostile(mark).values():
            file.write_bytes(bad)
            with pytest.raises(LabError, match="unpack https://"):
                load_data(str(tmp_path), None, None)
        file.write_bytes(good)
    assert not mark.exists()
    load_data(str(tmp_path), None, None)


def test_bytes_changed_at_random_are_read_or_refused(tmp_path):
    written = pickle.dumps(CONTENT, 2)
    chance = np.random.default_rng(0)
    read = 0
    for _ in range(400):
        changed = bytearray(written[: chance.integers(1, len(written) + 1)] if chance.random() < 0.3 else written)
        for place in chance.integers(0, len(changed), 3):
            changed[place] = chance.integers(0, 256)
        (tmp_path / "file").write_bytes(changed)
        # Any other exception fails the test.
        with contextlib.suppress(LabError):
            read_plain_pickle(tmp_path / "file")
            read += 1
    assert 0 < read < 400


def test_one_part_named_often_is_made_once(tmp_path):
    part: list = []
    for _ in range(60):
        part = [part, part]
    (tmp_path / "file").write_bytes(pickle.dumps(part))
    read = read_plain_pickle(tmp_path / "file")
    assert read[0] is read[1]
    assert sum(1 for _ in pickletools.genops((tmp_path / "file").read_bytes())) < 1000
