"""The module graph of DESIGN: two columns that meet late, imports only downwards."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "openmm_regflow"

ARRAYS = ["errors", "_version", "elements", "allocation", "files", "device", "ranks", "compiling", "products", "graphs"]
ARRAYS += ["reweighting", "metrics", "plots", "rigid"]
LEARNING = [
    "networks",
    "bijections",
    "coordinates",
    "priors",
    "flows",
    "mixtures",
    "frames",
    "slopes",
    "teachers",
    "targets",
    "objectives",
    "training",
    "pools",
    "refinement",
    "recipes",
]
PHYSICS = ["units", "ladders", "constraints", "bonds", "fingerprints", "potentials", "trajectories", "systems", "toys"]
PHYSICS += ["simulate"]
MEETING = ["refusals", "proposals", "sampling", "ensemble", "moves", "chains", "tfep", "evaluation", "check", "report"]
MEETING += ["outputs", "speed", "demo", "paper", "doctor", "cli"]
OPTIONAL = {
    "ot": {"targets", "metrics"},
    "pymbar": {"tfep"},
    "openmmtools": {"moves", "simulate", "chains"},
    "matplotlib": {"plots"},
}


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports() -> list[tuple[str, str, bool]]:
    """(importing module, imported top-level or own module, is it ours) over the whole package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = module_of(path)
        if own in ("__init__", "__main__"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative imports hide the graph"
                names = [node.module or ""]
                if node.module == "openmm_regflow":
                    names = [f"openmm_regflow.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                parts = name.split(".")
                if parts[0] == "openmm_regflow":
                    if (
                        len(parts) > 1
                        and parts[1] != own
                        and (PACKAGE / parts[1]).is_dir() | (PACKAGE / f"{parts[1]}.py").is_file()
                    ):
                        found.append((own, parts[1], True))
                else:
                    found.append((own, parts[0], False))
    return found


def allowed(module: str) -> set[str]:
    if module in ARRAYS:
        return set(ARRAYS)
    if module in LEARNING:
        return set(ARRAYS) | set(LEARNING[: LEARNING.index(module)])
    if module in PHYSICS:
        return set(ARRAYS) | set(PHYSICS[: PHYSICS.index(module)])
    return set(ARRAYS + LEARNING + PHYSICS) | set(MEETING[: MEETING.index(module)])


def test_every_module_has_a_place():
    known = set(ARRAYS + LEARNING + PHYSICS + MEETING)
    present = {module_of(p) for p in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}
    assert present == known


def test_imports_point_one_way():
    wrong = [(a, b) for a, b, ours in imports() if ours and b not in allowed(a)]
    assert not wrong


def test_learning_never_imports_openmm():
    wrong = [
        (a, b) for a, b, ours in imports() if not ours and a in LEARNING + ARRAYS and b in ("openmm", "openmmtools")
    ]
    assert not wrong


@pytest.mark.parametrize("name", sorted(OPTIONAL))
def test_heavy_dependency_in_one_place(name):
    users = {a for a, b, ours in imports() if not ours and b == name}
    assert users <= OPTIONAL[name]


def test_functions_stay_short():
    lengths = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                doc = ast.get_docstring(node)
                lengths[f"{path.name}:{node.name}"] = (
                    node.end_lineno - node.lineno + 1 - (doc.count("\n") + 2 if doc else 0)
                )
    assert max(lengths.values()) <= 100, max(lengths, key=lengths.get)
    assert sorted(lengths.values())[len(lengths) // 2] <= 12
