"""The expression language against OpenMM's own parser, through real CustomExternalForces."""

import numpy as np
import openmm
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openmm_regflow.errors import InputError
from openmm_regflow.potentials import OpenMMPotential, TorchPotential
from openmm_regflow.potentials.expressions import FUNCTIONS, Program, parse, variables
from openmm_regflow.potentials.tabulated import table

POINTS = np.array([[0.3, 1.7, -0.4], [-1.2, 0.6, 2.2], [0.9, -0.8, 0.5], [2.0, 3.0, -1.0]])


def openmm_values(text, points=POINTS):
    """Energy and minus force of OpenMM for an expression of x, y, z at each point."""
    system = openmm.System()
    system.addParticle(1.0)
    force = openmm.CustomExternalForce(text)
    force.addParticle(0, [])
    system.addForce(force)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    values, gradients = [], []
    for point in points:
        context.setPositions(point[None])
        state = context.getState(getEnergy=True, getForces=True)
        values.append(state.getPotentialEnergy()._value)
        gradients.append(-state.getForces(asNumpy=True)._value[0])
    return np.array(values), np.array(gradients)


def our_values(text, points=POINTS):
    program = Program(text, [], ["x", "y", "z"])
    x = torch.tensor(points, requires_grad=True)
    value = (program.run(dict(zip("xyz", x.T)), program.fold({})) + 0.0 * x.sum(-1)).reshape(len(points))
    return value.detach().numpy(), torch.autograd.grad(value.sum(), x)[0].numpy()


ARGUMENT = {
    "asin": "0.3*sin(x)", "acos": "0.3*sin(x)", "log": "x^2+0.5", "sqrt": "x^2+0.5",
    "step": "x-y", "delta": "z-0.5", "floor": "3*x", "ceil": "3*x",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions(name):
    first = ARGUMENT.get(name, "x")
    args = {1: [first], 2: [first, "y"], 3: ["step(x-y)", "x*y", "z^2"]}[FUNCTIONS[name][0]]
    text = f"{name}({', '.join(args)}) * 1.25"
    for ours, theirs in zip(our_values(text), openmm_values(text)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "x-y-z", "x/y/z", "2^3^0.5*x", "-x^2", "-2^2+x", "2*-x", "x^-2", "(x+y)*(z-1)", "x^2*-y^3",
        "1.5e-1*x + .5*y + 2.*z", "-(x)", "--x", "x^-y^2*0+z", "a*b; a=x+c; b=y*c; c=z^2", "a^2;a=b;b=x*y;",
        "3", "x*0+2*3^2", "select(0, x, y)", "select(1, x, y)", "x^7-x^20", "y^2.5*0+x^0", "k*(x-x0)^2; k=3; x0=.1",
    ],
)  # fmt: skip
def test_grammar(text):
    for ours, theirs in zip(our_values(text, POINTS[:1]), openmm_values(text, POINTS[:1])):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


_LEAF = st.sampled_from(["x", "y", "z", "2", "0.7", "1e-1"])


def _compound(inner):
    binary = st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda t: f"{t[0]}{t[1]}{t[2]}")
    grouped = inner.map(lambda t: f"({t})")
    called = st.tuples(st.sampled_from(["sin", "tanh", "square", "cos"]), inner).map(lambda t: f"{t[0]}({t[1]})")
    power = st.tuples(_LEAF, st.sampled_from(["^2", "^3"])).map("".join)
    return st.one_of(binary, grouped, called, power, inner.map(lambda t: f"-{t}"))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.recursive(_LEAF, _compound, max_leaves=8))
def test_random_expressions(text):
    ours, theirs = our_values(text, POINTS[:2]), openmm_values(text, POINTS[:2])
    for mine, reference in zip(ours, theirs):
        np.testing.assert_allclose(mine, reference, rtol=1e-10, atol=1e-10)


def test_a_wrong_precedence_would_be_seen():
    """Planted error: the minus binding more tightly than the power gives another value."""
    theirs, _ = openmm_values("-x^2")
    wrong, _ = our_values("(-x)^2")
    assert not np.allclose(wrong, theirs)


@pytest.mark.parametrize(
    "text",
    ["x+", "x y", "(x", "x)", "foo(x)", "sin(x,y)", "x $ 2", "", "x; a", "1..2", "sin", "max(x)", "x,y",
     "distance(x+y,z)"],
)  # fmt: skip
def test_invalid_expressions_are_refused(text):
    with pytest.raises(InputError):
        Program(text, [], ["x", "y", "z"])


@pytest.mark.parametrize("text", ["__import__('os').system('true')", "x.__class__", "[x for x in y]", "lambda: 0"])
def test_text_is_never_run_as_code(text):
    with pytest.raises(InputError):
        Program(text, [], ["x", "y", "z"])


def test_error_quotes_the_expression():
    with pytest.raises(InputError, match=r"unknown name 'q' in the expression 'x\*q'"):
        Program("x*q", ["k"], ["x"])


def test_parameters_are_folded_once():
    program = Program("sqrt(k)*exp(k)*x + k^2; ", ["k"], ["x"])
    coefficients = program.fold({"k": torch.tensor([[2.0]], dtype=torch.float64)})
    assert len(coefficients) == program.n_slots == 2
    value = program.run({"x": torch.tensor([[3.0]], dtype=torch.float64)}, coefficients)
    np.testing.assert_allclose(value.item(), np.sqrt(2) * np.exp(2) * 3 + 4, rtol=1e-14)


def test_equal_subexpressions_are_one_node():
    node = parse("sin(x)*sin(x)")
    assert node.args[0] is node.args[1]
    assert variables(node) == {"x"}


def test_gradient_of_the_branch_not_taken_is_zero_not_nan():
    x = torch.tensor([[-1.0, 4.0]], dtype=torch.float64, requires_grad=True)
    program = Program("select(step(x), d, 3*x); d=sqrt(x)", [], ["x"])
    program.run({"x": x}, program.fold({})).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[3.0, 0.25]], dtype=torch.float64))


def spline_cases():
    rng = np.random.default_rng(3)
    closed = rng.normal(size=9)
    closed[-1] = closed[0]
    torus = rng.normal(size=(7, 6))
    torus[-1], torus[:, -1] = torus[0], torus[:, 0]
    cube = rng.normal(size=(5, 4, 6))
    cyclic = cube.copy()
    for axis in range(3):
        first = [slice(None)] * 3
        last = [slice(None)] * 3
        first[axis], last[axis] = 0, -1
        cyclic[tuple(last)] = cyclic[tuple(first)]
    one = openmm.Continuous1DFunction
    return {
        "natural-1d": (one(rng.normal(size=8), -1.5, 2.5), "f(x)"),
        "periodic-1d": (one(closed, -0.5, 0.7, True), "f(x)"),
        "natural-2d": (openmm.Continuous2DFunction(7, 6, torus.T.ravel(), -1.5, 2.5, -1, 3.5), "f(x,y)"),
        "periodic-2d": (openmm.Continuous2DFunction(7, 6, torus.T.ravel(), -1, 1, 0, 1, True), "f(x,y)"),
        "natural-3d": (openmm.Continuous3DFunction(5, 4, 6, cube.T.ravel(), -2, 3, -2, 4, -2, 3), "f(x,y,z)"),
        "periodic-3d": (openmm.Continuous3DFunction(5, 4, 6, cyclic.T.ravel(), -1, 1, 0, 1, 0, 2, True), "f(x,y,z)"),
        "discrete-1d": (openmm.Discrete1DFunction(rng.normal(size=9)), "f(2+floor(x))*x"),
        "discrete-2d": (openmm.Discrete2DFunction(5, 6, rng.normal(size=30)), "f(2+floor(x), 1+floor(y))*x"),
        "discrete-3d": (openmm.Discrete3DFunction(5, 6, 4, rng.normal(size=120)), "f(2+floor(x),1+floor(y),1)*z"),
    }


@pytest.mark.parametrize("name", sorted(spline_cases()))
def test_tabulated_functions(name):
    """Inside the grid, at its edge and outside, through a real CustomCompoundBondForce."""
    function, text = spline_cases()[name]
    points = POINTS if "discrete" not in name else POINTS[:3]
    system = openmm.System()
    system.addParticle(1.0)
    force = openmm.CustomCompoundBondForce(1, text.replace("x", "x1").replace("y", "y1").replace("z", "z1"))
    force.addTabulatedFunction("f", function)
    force.addBond([0], [])
    system.addForce(force)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    program = Program(text, [], ["x", "y", "z"], {"f": table(function)})
    for point in points:
        context.setPositions(point[None])
        state = context.getState(getEnergy=True, getForces=True)
        x = torch.tensor(point, requires_grad=True)
        value = program.run(dict(zip("xyz", x)), program.fold({}))
        (gradient,) = torch.autograd.grad(value, x)
        np.testing.assert_allclose(value.item(), state.getPotentialEnergy()._value, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(-gradient, state.getForces(asNumpy=True)._value[0], rtol=1e-7, atol=1e-7)


def test_long_sums():
    """A frozen metadynamics bias: a sum is as deep as it is long."""
    rng = np.random.default_rng(0)
    centres = rng.uniform(-3, 3, 2000)
    text = " + ".join(f"0.1*exp(-4*(x-({c:.6f}))^2)" for c in centres)
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)[None]
    program = Program(text, [], ["x"])
    found = program.run({"x": x}, program.fold({}))
    expected = sum(0.1 * torch.exp(-4 * (x - round(float(c), 6)) ** 2) for c in centres)
    assert torch.allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("at", [-0.5, -0.4, 0.5, 1.5, 2.5, 3.4])
def test_tables_round_halves_as_openmm_does(at):
    values = [3.0, -1.0, 4.0, 1.5]
    force = openmm.CustomCompoundBondForce(2, "f(t)*distance(p1,p2)^2")
    force.addTabulatedFunction("f", openmm.Discrete1DFunction(values))
    force.addPerBondParameter("t")
    force.addBond([0, 1], [at])
    system = openmm.System()
    for _ in range(2):
        system.addParticle(1.0)
    system.addForce(force)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions([[0, 0, 0], [1, 0, 0]])
    expected = context.getState(getEnergy=True).getPotentialEnergy()._value
    found = table(openmm.Discrete1DFunction(values))(torch.tensor([at], dtype=torch.float64))
    assert float(found) == expected or (np.isnan(expected) and torch.isnan(found).all())


@pytest.mark.parametrize(("name", "call"), [("neg", "neg(r)"), ("step", "step(r)"), ("select", "select(r, 1, 0)")])
def test_a_table_may_have_any_name(name, call):
    """Also one that OpenMM, or this package, has for something else."""
    values = np.random.default_rng(0).normal(size=8).tolist()
    several = openmm.Discrete3DFunction(2, 2, 2, values)
    function = several if name == "select" else openmm.Continuous1DFunction(values, 0.0, 3.0)
    force = openmm.CustomCompoundBondForce(2, f"{call}; r = distance(p1, p2)")
    force.addBond([0, 1], [])
    force.addTabulatedFunction(name, function)
    system = openmm.System()
    for _ in range(2):
        system.addParticle(1.0)
    system.addForce(force)
    x = np.zeros((5, 2, 3))
    x[:, 1, 0] = np.linspace(0.1, 1.3, 5)
    assert torch.allclose(TorchPotential(system)(x), OpenMMPotential(system, platform="Reference")(x))
