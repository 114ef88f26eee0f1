"""Files that are whole at any moment, and damaged ones that are named."""

import json
import multiprocessing
import os

import pytest
import torch
from safetensors.torch import save_file

from openmm_regflow.errors import CorruptFileError, InputError
from openmm_regflow.files import digest, read_json, read_safetensors, write_json, write_safetensors


def test_json_there_and_back(tmp_path):
    path = tmp_path / "folder" / "a.json"
    write_json(path, {"a": [1, 2.5, None], "φ": "ψ"})
    assert read_json(path, "") == {"a": [1, 2.5, None], "φ": "ψ"}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    (tmp_path / f"a.json.{os.getpid()}.part").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        write_json(path, {"a": 2})
    assert read_json(path, "") == {"a": 1}


def _write_often(path, barrier, failures):
    for k in range(20):
        barrier.wait()
        try:
            write_json(path, {"k": k})
        except InputError as error:
            failures.put(str(error))


def test_processes_may_write_the_same_file(tmp_path):
    """The ranks of a node that has no disk in common with rank 0 all begin the same folder."""
    context = multiprocessing.get_context("fork")
    barrier, failures = context.Barrier(2), context.Queue()
    writers = [context.Process(target=_write_often, args=(tmp_path / "a.json", barrier, failures)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failures.empty() and read_json(tmp_path / "a.json", "") == {"k": 19}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_equal_contents_give_equal_bytes(tmp_path):
    """safetensors alone orders the entries of its metadata by chance (six orders of three)."""
    tensors = {"b": torch.arange(5.0), "a": torch.zeros(2, 3, dtype=torch.float64), "c": torch.ones(1)}
    for i in range(12):
        write_safetensors(tmp_path / f"{i}.safetensors", tensors, {"format": "x", "format_version": 1, "umlaut": "ä"})
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(12)}) == 1
    header, back = read_safetensors(tmp_path / "0.safetensors", "x", 1)
    assert header["umlaut"] == "ä" and all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_a_header_that_was_changed_is_noticed(tmp_path):
    """Temperature, bond lengths and scales are part of a density as much as the weights are."""
    path, header = tmp_path / "a.safetensors", {"format": "x", "format_version": 1, "temperature": 300.0}
    write_safetensors(path, {"w": torch.ones(3)}, header)
    assert read_safetensors(path, "x", 1)[0] == header
    whole = path.read_bytes()
    assert whole.count(b"300.0") == 1
    path.write_bytes(whole.replace(b"300.0", b"200.0"))
    with pytest.raises(CorruptFileError, match="checksum"):
        read_safetensors(path, "x", 1)


def test_a_file_without_a_digest_of_its_header(tmp_path):
    """As earlier versions wrote them."""
    path, header = tmp_path / "a.safetensors", {"format": "x", "format_version": 1}
    tensors = {"w": torch.ones(3)}
    save_file(tensors, path, metadata={"regflow": json.dumps(header), "sha256": digest(tensors)})
    assert read_safetensors(path, "x", 1)[0] == header


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[1]", b"\xff\xfe"])
def test_damaged_json_is_named_with_the_remedy(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"a\.json is damaged .*; make it again"):
        read_json(path, "make it again")
