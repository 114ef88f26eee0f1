"""One self-contained HTML file from tables, figures, verdicts and provenance.

Nothing in it is loaded from elsewhere: images are embedded, the style is inline, there is no script. It opens from
a mail attachment, prints, and can be archived next to the data.
"""

import base64
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from openmm_regflow._version import __version__
from openmm_regflow.errors import InputError

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Table:
    """Rows of a table under an optional head.

    Attributes:
        rows: cells, converted by ``str``.
        head: column names; empty for none.
    """

    rows: Sequence[Sequence[Any]]
    head: Sequence[str] = ()


@dataclass(frozen=True)
class Figure:
    """An image with its caption.

    Attributes:
        image: PNG bytes, or the path of a PNG file.
        caption: what to see in it.
    """

    image: bytes | str | Path
    caption: str = ""


def _png(name: str, image: Any) -> bytes:
    """PNG bytes of a figure's image.

    Raises:
        InputError: the file is missing or it is no PNG.
    """
    if not isinstance(image, bytes):
        try:
            image = Path(image).read_bytes()
        except (OSError, TypeError) as error:
            raise InputError(
                f"figure {name!r}: {image!r} cannot be read ({error}); give PNG bytes or a path"
            ) from error
    if not image.startswith(_PNG):
        raise InputError(f"figure {name!r} is not a PNG image; save it as .png first")
    return image


def _kind(verdict: str) -> str:
    """Colour class of a verdict by its first words."""
    for words, kind in (("reliable", "good"), ("use with care", "care"), ("do not trust", "bad")):
        if verdict.lower().startswith(words):
            return kind
    return ""


def _named(verdicts: Mapping[str, str] | Sequence[str]) -> list[tuple[str, str]]:
    """(name, sentence) pairs; the name of a plain sentence is what stands before a verdict's first words."""
    if isinstance(verdicts, Mapping):
        return list(verdicts.items())
    parts = [sentence.partition(": ") for sentence in verdicts]
    return [(p[0], p[2]) if _kind(p[2]) else ("", "".join(p)) for p in parts]


def _as_table(value: Any) -> Table:
    """Tables given as :class:`Table`, as a mapping of names to values, or as rows."""
    if isinstance(value, Table):
        return value
    return Table(list(value.items()) if isinstance(value, Mapping) else list(value))


def render(
    *,
    title: str,
    lead: str = "",
    tables: Mapping[str, Any] | None = None,
    figures: Mapping[str, Any] | None = None,
    verdicts: Mapping[str, str] | Sequence[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> str:
    """The report as an HTML string; arguments as in :func:`write_report`."""
    import jinja2

    source = resources.files("openmm_regflow").joinpath("report_template.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    images = []
    for name, value in (figures or {}).items():
        figure = value if isinstance(value, Figure) else Figure(value)
        data = base64.b64encode(_png(name, figure.image)).decode("ascii")
        images.append({"name": name, "caption": figure.caption, "data": data})
    named = [(name, _as_table(value)) for name, value in (tables or {}).items()]
    return environment.from_string(source).render(
        title=title,
        lead=lead,
        tables=[{"name": name, "rows": t.rows, "head": t.head} for name, t in named],
        figures=images,
        verdicts=[{"name": n, "text": t, "kind": _kind(t)} for n, t in _named(verdicts or {})],
        provenance=[*(provenance or {}).items(), ("openmm-regflow", __version__)],
    )


def write_report(
    path: str | Path,
    *,
    title: str,
    lead: str = "",
    tables: Mapping[str, Any] | None = None,
    figures: Mapping[str, Any] | None = None,
    verdicts: Mapping[str, str] | Sequence[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report atomically: a reader sees the old file or the whole new one.

    Args:
        path: of the HTML file; its folder is made if missing.
        title: heading.
        lead: one paragraph under it.
        tables: name -> :class:`Table`, mapping of names to values, or sequence of rows.
        figures: name -> :class:`Figure`, PNG bytes, or path of a PNG file.
        verdicts: name -> sentence, or sentences ``"name: verdict"``; ``reliable``, ``use with care`` and ``do not
        trust`` at its start set the colour. provenance: name -> value: seeds, versions, hashes, command line.

    Returns:
        The path.

    Raises:
        InputError: a figure is missing or no PNG, or the file cannot be written.
    """
    html = render(title=title, lead=lead, tables=tables, figures=figures, verdicts=verdicts, provenance=provenance)
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(target, html)
    except OSError as error:
        raise InputError(f"report {target} cannot be written: {error}; choose another folder or free space") from error
    return target


def _write_atomically(target: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a report is as readable as any other file of the user's.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
