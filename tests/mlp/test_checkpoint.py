"""Files that are whole or not there."""

import os
import pickle

import pytest
import torch
from fusemlp.mlp.training.checkpoint import atomic_write, load_checkpoint, save_checkpoint
from fusemlp.mlp.training.errors import InputError


def test_round_trip(tmp_path):
    save_checkpoint(tmp_path / "c.pt", {"weight": torch.arange(3), "options": {"lr": 0.1, "hidden": [4, 2]}})
    contents = load_checkpoint(tmp_path / "c.pt")
    assert contents["weight"].tolist() == [0, 1, 2]
    assert contents["options"] == {"lr": 0.1, "hidden": [4, 2]}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "c.pt"
    path.write_bytes(b"old")

    def crash():
        with atomic_write(path) as file:
            file.write(b"half of the ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crash()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_contents_are_on_disk_before_the_name_is(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(os, "fsync", lambda _: order.append("fsync"))
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: order.append("replace"))
    with atomic_write(tmp_path / "c.pt") as file:
        file.write(b"new")
    assert order == ["fsync", "replace", "fsync"]  # of the contents, and of the folder


def corrupted(path):
    save_checkpoint(path, {"weight": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:300])


def flipped(path):
    save_checkpoint(path, {"weight": torch.zeros(1000)})
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def foreign(path):
    torch.save({"model": torch.zeros(3)}, path)


def malicious(path):
    class Exploit:
        def __reduce__(self):
            return os.mkdir, (str(path) + ".exploited",)

    path.write_bytes(pickle.dumps(Exploit()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_bytes(b"not a checkpoint"), "damaged or not a checkpoint"),
        (corrupted, "damaged or not a checkpoint"),
        (flipped, "damaged or not a checkpoint"),
        (foreign, "was not written by"),
        (malicious, "damaged or not a checkpoint"),
    ],
    ids=["missing", "text", "truncated", "bit-flip", "foreign", "malicious"],
)
def test_what_is_no_checkpoint_is_refused_by_name(make, message, tmp_path):
    path = tmp_path / "c.pt"
    make(path)
    with pytest.raises(InputError, match=rf"checkpoint .*c\.pt.*{message}"):
        load_checkpoint(path)
    assert not (tmp_path / "c.pt.exploited").exists()
