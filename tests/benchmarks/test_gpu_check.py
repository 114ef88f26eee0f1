"""What `make gpu-check` writes, as far as it needs no GPU."""

import json
import sys

import gpu
import pytest
import torch


def test_a_part_that_fails_takes_nothing_along(tmp_path, capsys):
    record = gpu.Record(tmp_path / "gpu.json", {"chip": "abacus"})

    def first():
        """First."""
        return {"rate": 1.5}

    def second():
        """Second."""
        held = json.loads(record.path.read_text())
        assert held["first"] == {"rate": 1.5} and held["chip"] == "abacus"
        raise RuntimeError("CUDA error:\nout of memory")

    def third():
        """Third."""
        return 3

    for part in (first, second, third):
        record.add(part)
    found = json.loads(record.path.read_text())
    assert found["second"] == {"FAILED": "RuntimeError: CUDA error: out of memory"} and found["third"] == 3
    assert record.failed == ["second"] and "Third." in capsys.readouterr().out


def test_parts_of_the_same_commit_stay(tmp_path):
    path = tmp_path / "gpu.json"
    for commit, name in (("a", "first"), ("a", "second"), ("b", "third")):
        record = gpu.Record(path, {"conditions": {"commit": commit}})

        def part():
            """A part."""
            return 1

        part.__name__ = name
        record.add(part)
        found = json.loads(path.read_text())
        assert set(found) >= ({"first", "second"} if name == "second" else {name})
    assert "first" not in found and "second" not in found


def test_outcomes_count_what_pytest_did(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "def test_broken(nothing): pass\n"
        "@pytest.mark.skip(reason='no abacus')\n"
        "def test_left_out(): pass\n"
    )
    counts = gpu.outcomes(["-q", "-p", "no:cacheprovider", "test_some.py"], tmp_path)
    assert counts == {"passed": 1, "failed": ["test_bad", "test_broken"], "skipped": 1, "reasons": ["no abacus"]}
    with pytest.raises(RuntimeError, match="exit code 4"):
        gpu.outcomes(["--no-such-option"], tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    gpu.main()
    out = capsys.readouterr().out
    assert out.startswith("NOT RUN: there is no GPU here") and out.count("\n") == 1 and not list(tmp_path.iterdir())
