"""Files that are whole at any moment, and damaged ones that are named."""

import pytest

from openmm_regflow.errors import CorruptFileError, InputError
from openmm_regflow.files import read_json, write_json


def test_json_there_and_back(tmp_path):
    path = tmp_path / "folder" / "a.json"
    write_json(path, {"a": [1, 2.5, None], "φ": "ψ"})
    assert read_json(path, "") == {"a": [1, 2.5, None], "φ": "ψ"}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    (tmp_path / "a.json.part").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        write_json(path, {"a": 2})
    assert read_json(path, "") == {"a": 1}


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[1]", b"\xff\xfe"])
def test_damaged_json_is_named_with_the_remedy(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"a\.json is damaged .*; make it again"):
        read_json(path, "make it again")
