"""Files of tensors (safetensors with a JSON header, weights rounded if wished) and of JSON: written atomically, checked
when they are read.

Nothing in them is run when they are read.
"""

import contextlib
import hashlib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from openmm_regflow.errors import CorruptFileError, InputError

#: Ending of the name of the scales that belong to a matrix of integers.
SCALE = "|scale"
#: Key of the digest of the JSON header, beside "sha256" of the tensors.
HEADER_DIGEST = "header sha256"


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names and bytes of tensors."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; then it is fsynced and renamed into place.

    Raises:
        InputError: the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")  # processes may write the same file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        # safetensors makes private files; the umask is the user's word on that.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {path}: {error}; choose a writable folder with free space") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write text to a file that is whole at any moment.

    Raises:
        InputError: the folder cannot be written or the disk is full.
    """
    with _replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as JSON to a file that is whole at any moment.

    Raises:
        InputError: the folder cannot be written or the disk is full.
    """
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: str | Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: of the file.
        remedy: what the message says to do about a damaged one.

    Raises:
        CorruptFileError: no JSON, or no object.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise CorruptFileError(f"{path} is damaged (a {type(found).__name__}, no object); {remedy}")
    return found


def read_toml(path: str | Path) -> dict[str, Any]:
    """The table in a TOML file.

    Raises:
        InputError: no TOML.
        OSError: no such file, or none that may be read.
    """
    with open(path, "rb") as handle:
        try:
            return tomllib.load(handle)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not TOML: {error}") from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header to a file that is whole at any moment; equal contents give equal bytes.

    Raises:
        InputError: the folder cannot be written or the disk is full.
    """
    text = json.dumps(header)
    metadata = {"regflow": text, "sha256": digest(tensors), HEADER_DIGEST: hashlib.sha256(text.encode()).hexdigest()}
    content = memoryview(save(dict(tensors), metadata=metadata))
    # safetensors writes the entries of the metadata in another order each time; a file's hash is what moves know it by.
    size = int.from_bytes(content[:8], "little")
    ordered = json.dumps(json.loads(bytes(content[8 : 8 + size])), sort_keys=True, separators=(",", ":")).encode()
    ordered += b" " * (-len(ordered) % 8)
    with _replacing(path) as temporary, open(temporary, "wb") as handle:
        handle.write(len(ordered).to_bytes(8, "little") + ordered)
        handle.write(content[8 + size :])


def kind_of(path: Path) -> str | None:
    """What the header of a file of this package calls it; None for any other file, or none."""
    try:
        with safe_open(path, framework="pt") as handle:
            found = json.loads((handle.metadata() or {})["regflow"]).get("format")
    except (SafetensorError, OSError, KeyError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def read_safetensors(path: Path, kind: str, *versions: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file written by this package, checked against its own digests.

    Args:
        path: of the file.
        kind: what its header has to call it.
        versions: formats that can be read.

    Raises:
        InputError: no such file.
        CorruptFileError: truncated, damaged, of another kind, or of a newer format.
    """
    if not path.is_file():
        raise InputError(f"no file {path}; give the path of an existing file")
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        header = json.loads(metadata["regflow"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CorruptFileError(
            f"{path} is damaged or no file of this package ({error}); copy or make it again"
        ) from error
    if header.get("format") != kind:
        raise CorruptFileError(f"{path} holds {header.get('format')!r}, {kind!r} is needed")
    found = header.get("format_version", 0)
    if found not in versions:
        newer = found > max(versions)
        remedy = "update the package" if newer else "it was written before the first release; make it again"
        read = " and ".join(map(str, versions))
        raise CorruptFileError(f"{path} has format {found}, this package reads {read}; {remedy}")
    sha256 = hashlib.sha256(metadata["regflow"].encode()).hexdigest()
    # Files of earlier versions have no digest of their header.
    if metadata.get("sha256") != digest(tensors) or metadata.get(HEADER_DIGEST, sha256) != sha256:
        raise CorruptFileError(f"{path} is damaged: its contents do not match their checksum; copy or make it again")
    return header, tensors


def rounded(weights: Mapping[str, Tensor], bits: Literal[8, 16]) -> dict[str, Tensor]:
    """Float32 tensors in fewer bits; others as they are.

    Args:
        weights: by name.
        bits: 16: float16. 8: matrices as integers -127 to 127 with a scale `(n, 1)` for each row under a name of its
            own, the rest as float16. What has been rounded once stays as it is when it is rounded again.

    Raises:
        InputError: a weight that is not finite, or beyond the range of float16.
    """
    found: dict[str, Tensor] = {}
    for name, v in weights.items():
        if v.dtype != torch.float32:
            found[name] = v
        elif bits == 8 and v.ndim == 2:
            found[name + SCALE] = _scales(v)
            found[name] = (v / found[name + SCALE]).round().to(torch.int8)
        else:
            found[name] = v.half()
    if not all(bool(torch.isfinite(v).all()) for v in found.values() if v.is_floating_point()):
        raise InputError("weights beyond 65504 cannot be rounded; save the flow with bits=32")
    return found


def _scales(v: Tensor) -> Tensor:
    """A 127th of the largest magnitude of each row, with twelve bits, so that its multiples are exact."""
    mantissa, exponent = torch.frexp(v.abs().amax(1, keepdim=True) / 127)
    scale = torch.ldexp((mantissa * 4096).ceil() / 4096, exponent)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def restored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `rounded` made of weights, as float32 again."""
    return {
        name: v.float() * tensors[name + SCALE] if v.dtype == torch.int8 else v.float() if v.dtype == torch.half else v
        for name, v in tensors.items()
        if not name.endswith(SCALE)
    }
