"""Names of elements, for topologies of OpenMM and of mdtraj alike."""

from typing import Any


def symbol(atom: Any) -> str:
    """Element of an atom of a topology, "X" for one without: OpenMM then has None, mdtraj a site of symbol VS."""
    name = getattr(atom.element, "symbol", None)
    return "X" if name in (None, "VS") else name
