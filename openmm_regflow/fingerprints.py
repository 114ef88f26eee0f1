"""Fingerprints of Systems: what decides whether two of them share one energy function, and how two differ, in words."""

import hashlib
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import openmm
from openmm import unit

from openmm_regflow.errors import InputError

#: Forces that change neither the potential energy nor the distribution of positions.
_NOT_ENERGIES = ("CMMotionRemover", "AndersenThermostat")
#: Attributes of a serialised System that change no energy, and those of a force that say what it is called.
_NOT_PARAMETERS, _NAMES = {"forceGroup", "version"}, {"name", "type"}
#: Fingerprints of version 1 left out the names and types of everything, those of parameters, functions, computed values
#: and particles too, so that energies which differ by them alone had one fingerprint.
FINGERPRINT_VERSION = 2


def fingerprint(system: openmm.System, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What decides whether two Systems share one energy function, in a form that fits JSON.

    Numbers are rounded to nine digits, so that the last bit of a parsed parameter does not matter; names, force
    groups and centre-of-mass removal do not matter either. Masses are listed but left out of ``sha256``: they do
    not change the distribution of positions, and hydrogen mass repartitioning has to stay possible.

    Args:
        system: any.
        like: a stored fingerprint, in whose version this one is made so that the two can be compared; None: the newest.

    Returns:
        ``version``, absent from the first; ``n_atoms``; ``masses`` [dalton]; ``forces``: one
        ``{"type", "terms", "sha256"}`` per force (constraints, virtual sites and a periodic box count as forces),
        sorted; ``sha256`` over atoms and forces.

    Raises:
        InputError: ``like`` is of a version that this package does not know.
    """
    version = FINGERPRINT_VERSION if like is None else like.get("version", 1)
    if version not in (1, FINGERPRINT_VERSION):
        raise InputError(f"the stored fingerprint of a System has version {version}; update the package to compare it")
    root = ElementTree.fromstring(openmm.XmlSerializer.serialize(system))
    masses = [system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(system.getNumParticles())]
    parts = {part.tag: part for part in root}
    nodes = [(node.attrib["type"], node) for node in parts["Forces"] if node.attrib["type"] not in _NOT_ENERGIES]
    if len(parts["Constraints"]):
        nodes.append(("Constraints", parts["Constraints"]))
    if any(len(node) for node in parts["Particles"]):
        nodes.append(("VirtualSites", parts["Particles"]))
    if system.usesPeriodicBoundaryConditions():
        nodes.append(("PeriodicBox", parts["PeriodicBoxVectors"]))
    forces = sorted((_describe(kind, node, version) for kind, node in nodes), key=lambda f: (f["type"], f["sha256"]))
    digest = hashlib.sha256(repr((len(masses), [(f["type"], f["sha256"]) for f in forces])).encode()).hexdigest()
    found = {"n_atoms": len(masses), "masses": masses, "forces": forces, "sha256": digest}
    return found if version == 1 else {"version": version} | found


def _describe(kind: str, node: ElementTree.Element, version: int) -> dict[str, Any]:
    """Type, number of terms and hash of one serialised force."""
    terms = max((len(child) for child in node), default=0) if kind not in ("Constraints", "PeriodicBox") else len(node)
    return {"type": kind, "terms": terms, "sha256": hashlib.sha256(_canonical(node, version).encode()).hexdigest()}


def _canonical(node: ElementTree.Element, version: int) -> str:
    """Text of an XML element with sorted attributes and rounded numbers, without what does not change an energy."""
    drop = _NOT_PARAMETERS | ({"mass"} if node.tag == "Particle" else set())
    drop |= _NAMES if node.tag == "Force" or version == 1 else set()
    attributes = [f"{key}={_rounded(value)}" for key, value in sorted(node.items()) if key not in drop]
    return f"<{node.tag} {' '.join(attributes)}>{''.join(_canonical(child, version) for child in node)}</>"


def _rounded(text: str) -> str:
    """Nine significant digits of a number, anything else as it is."""
    try:
        return f"{float(text) + 0.0:.9g}"
    except ValueError:
        return text


def compare_fingerprints(
    a: dict[str, Any], b: dict[str, Any], *, masses: bool = False, extra_forces: bool = False
) -> list[str]:
    """Differences between two fingerprints of one version in words; empty where the energies are the same.

    Args:
        a: the one that is expected.
        b: the one that is there.
        masses: report differing masses as well; they do not change the distribution of positions.
        extra_forces: forces of `b` beside those of `a`, such as a bias, are no difference.

    Returns:
        One line per difference.
    """
    lines = []
    if a["n_atoms"] != b["n_atoms"]:
        lines.append(f"{a['n_atoms']} atoms expected, {b['n_atoms']} found")
    if extra_forces:
        known, there = (Counter((force["type"], force["sha256"]) for force in f["forces"]) for f in (a, b))
        if known <= there:
            b = {**b, "forces": a["forces"]}
    types_a, types_b = (Counter(force["type"] for force in f["forces"]) for f in (a, b))
    lines += [f"{kind} is missing" for kind in sorted((types_a - types_b).elements())]
    lines += [f"{kind} is not expected" for kind in sorted((types_b - types_a).elements())]
    for kind in sorted(types_a & types_b):
        lines += _compare_forces(kind, a, b) if types_a[kind] == types_b[kind] else []
    if masses and a["n_atoms"] == b["n_atoms"]:
        moved = [i for i, (m, n) in enumerate(zip(a["masses"], b["masses"])) if not np.isclose(m, n, rtol=1e-9)]
        lines += [f"masses of {len(moved)} atoms differ, first atom {moved[0]}"] if moved else []
    return lines


def _compare_forces(kind: str, a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Differences between equally many forces of one type."""
    own, other = (Counter((f["sha256"], f["terms"]) for f in side["forces"] if f["type"] == kind) for side in (a, b))
    if own == other:
        return []
    terms_a, terms_b = (sorted(n for _, n in rest.elements()) for rest in (own - other, other - own))
    if terms_a != terms_b:
        return [f"{kind}: {terms_a} terms expected, {terms_b} found"]
    return [f"{kind}: parameters or atom order differ"]
