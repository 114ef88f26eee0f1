"""OpenMM's expression language translated to torch operations, without ever evaluating text as code.

The language is that of the Lepton parser which ships with OpenMM: arithmetic with ``^`` for powers, the functions
of `FUNCTIONS`, tabulated functions, and intermediate values after semicolons, each of which may use those that
follow it: ``k*d^2; d = r - r0; r0 = 0.1``.

An expression becomes a graph in which equal sub-expressions are one node. `Program` splits that graph in two: what
depends on parameters alone is computed once, in float64, and what depends on positions runs for every batch.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from openmm_regflow.errors import InputError

Value = Tensor | float
#: A tabulated function of tensors.
Table = Callable[..., Tensor]

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_][^\s+\-*/^(),;=]*)|(?P<op>[-+*/^(),]))"
)
#: Binding power and whether the right operand binds equally strongly (right-associative).
_BINARY = {"+": (1, False), "-": (1, False), "*": (2, False), "/": (2, False), "^": (4, True)}
_UNARY_POWER = 3
_GEOMETRIC = frozenset({"distance", "angle", "dihedral"})
_LARGEST_UNROLLED_POWER = 16


class Node:
    """One value of an expression: a number, a variable, or an operation on other nodes."""

    __slots__ = ("args", "name", "number")

    def __init__(self, name: str, args: tuple["Node", ...] = (), number: float | None = None) -> None:
        self.name, self.args, self.number = name, args, number

    @property
    def is_variable(self) -> bool:
        """Whether this is a variable."""
        return self.number is None and self.name.startswith("$")


class _Graph:
    """Nodes by content, so that equal sub-expressions are one node."""

    def __init__(self) -> None:
        self._nodes: dict[tuple, Node] = {}

    def number(self, value: float) -> Node:
        return self._nodes.setdefault(("#", value), Node("#", number=value))

    def variable(self, name: str) -> Node:
        return self._nodes.setdefault(("$", name), Node("$" + name))

    def call(self, name: str, *args: Node) -> Node:
        return self._nodes.setdefault((name, *map(id, args)), Node(name, args))


class _Parser:
    """Precedence climbing (Pratt) over the tokens of one expression without semicolons."""

    def __init__(
        self, text: str, graph: _Graph, definitions: Mapping[str, Node], functions: Mapping[str, int | None]
    ) -> None:
        self._text, self._graph, self._definitions, self._functions = text, graph, definitions, functions
        self._tokens = list(self._tokenise())
        self._next = 0

    def _tokenise(self) -> Iterable[tuple[str, str]]:
        position, end = 0, len(self._text.rstrip())
        while position < end:
            match = _TOKEN.match(self._text, position)
            if match is None:
                raise self._error(f"unexpected character {self._text[position:].lstrip()[0]!r}")
            position = match.end()
            yield str(match.lastgroup), match.group(str(match.lastgroup))

    def _error(self, what: str) -> InputError:
        return InputError(f"{what} in the expression {self._text.strip()!r}; see OpenMM's guide to custom forces")

    def _peek(self) -> str:
        return self._tokens[self._next][1] if self._next < len(self._tokens) else ""

    def _take(self, expected: str | None = None) -> tuple[str, str]:
        if self._next == len(self._tokens):
            raise self._error("unexpected end")
        token = self._tokens[self._next]
        if expected is not None and token[1] != expected:
            raise self._error(f"{token[1]!r} where {expected!r} was expected")
        self._next += 1
        return token

    def parse(self) -> Node:
        node = self._binary(0)
        if self._next < len(self._tokens):
            raise self._error(f"unexpected {self._peek()!r}")
        return node

    def _binary(self, power: int) -> Node:
        left = self._unary()
        while self._peek() in _BINARY:
            own, right_associative = _BINARY[self._peek()]
            if own < power:
                break
            operator = self._take()[1]
            left = self._graph.call(operator, left, self._binary(own if right_associative else own + 1))
        return left

    def _unary(self) -> Node:
        kind, text = self._take()
        if kind == "number":
            return self._graph.number(float(text))
        if kind == "name":
            return self._call(text) if self._peek() == "(" else self._variable(text)
        if text == "-":
            return self._graph.call(_MINUS, self._binary(_UNARY_POWER))
        if text != "(":
            raise self._error(f"unexpected {text!r}")
        node = self._binary(0)
        self._take(")")
        return node

    def _variable(self, name: str) -> Node:
        return self._definitions[name] if name in self._definitions else self._graph.variable(name)

    def _call(self, name: str) -> Node:
        args = self._arguments()
        if name in _GEOMETRIC:
            if not all(arg.is_variable for arg in args):
                raise self._error(f"{name}() of something other than particles")
            return self._graph.variable(f"{name}({','.join(arg.name[1:] for arg in args)})")
        if name not in self._functions:
            raise self._error(f"unknown function {name!r}")
        if self._functions[name] not in (None, len(args)):
            raise self._error(f"{name}() with {len(args)} arguments")
        return self._graph.call(name, *args)

    def _arguments(self) -> list[Node]:
        self._take("(")
        args = [self._binary(0)]
        while self._peek() == ",":
            self._take()
            args.append(self._binary(0))
        self._take(")")
        return args


def parse(text: str, tables: Iterable[str] = ()) -> Node:
    """The graph of an expression.

    Args:
        text: expression in OpenMM's language.
        tables: names of tabulated functions it may call.

    Returns:
        The node of the value; variables are nodes named ``$name``. ``distance(p1,p2)``, ``angle(...)`` and
        ``dihedral(...)`` of particles are variables too, named like the call without blanks.

    Raises:
        InputError: the text is not a valid expression; the message quotes it.
    """
    graph = _Graph()
    functions: dict[str, int | None] = {name: arity for name, (arity, _) in FUNCTIONS.items()}
    functions |= dict.fromkeys(tables)
    value, *rest = text.split(";")
    definitions: dict[str, Node] = {}
    for definition in reversed([part for part in rest if part.strip()]):
        name, equals, body = definition.partition("=")
        if not equals or not name.strip():
            raise InputError(f"{definition.strip()!r} is not a definition 'name = value' in {text!r}")
        definitions[name.strip()] = _Parser(body, graph, definitions, functions).parse()
    return _Parser(value, graph, definitions, functions).parse()


def variables(node: Node) -> set[str]:
    """Names of all variables below a node."""
    found, stack, seen = set(), [node], set()
    while stack:
        current = stack.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if current.is_variable:
            found.add(current.name[1:])
        stack.extend(current.args)
    return found


def _like(*values: Value) -> list[Tensor]:
    """Tensors of one dtype from tensors and numbers."""
    model = next(v for v in values if isinstance(v, Tensor))
    return [v if isinstance(v, Tensor) else torch.full((), v, dtype=model.dtype, device=model.device) for v in values]


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(exponent, Tensor) or isinstance(base, float):
        return torch.pow(*_like(base, exponent))
    count = abs(int(exponent))
    if exponent != int(exponent) or not 0 < count <= _LARGEST_UNROLLED_POWER:
        return torch.pow(base, exponent)
    factors, square = [], base
    while count:
        if count & 1:
            factors.append(square)
        square, count = square * square, count >> 1
    product = reduce(torch.mul, factors)
    return product if exponent > 0 else 1.0 / product


def _where(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(condition, yes, no)


def _step(x: Value) -> Value:
    return (x >= 0).to(x.dtype)  # type: ignore[union-attr]


def _unary(function: Callable[[Tensor], Tensor]) -> tuple[int, Callable[..., Value]]:
    return 1, function


#: Number of arguments and torch counterpart of each function and operator of the language.
FUNCTIONS: dict[str, tuple[int, Callable[..., Value]]] = {
    "sqrt": _unary(torch.sqrt),
    "exp": _unary(torch.exp),
    "log": _unary(torch.log),
    "sin": _unary(torch.sin),
    "cos": _unary(torch.cos),
    "tan": _unary(torch.tan),
    "sec": _unary(lambda x: 1.0 / torch.cos(x)),
    "csc": _unary(lambda x: 1.0 / torch.sin(x)),
    "cot": _unary(lambda x: 1.0 / torch.tan(x)),
    "asin": _unary(torch.asin),
    "acos": _unary(torch.acos),
    "atan": _unary(torch.atan),
    "sinh": _unary(torch.sinh),
    "cosh": _unary(torch.cosh),
    "tanh": _unary(torch.tanh),
    "erf": _unary(torch.erf),
    "erfc": _unary(torch.erfc),
    "abs": _unary(torch.abs),
    "floor": _unary(torch.floor),
    "ceil": _unary(torch.ceil),
    "step": _unary(_step),  # type: ignore[arg-type]
    "delta": _unary(lambda x: (x == 0).to(x.dtype)),
    "square": _unary(lambda x: x * x),
    "cube": _unary(lambda x: x * x * x),
    "recip": _unary(lambda x: 1.0 / x),
    "atan2": (2, lambda y, x: torch.atan2(*_like(y, x))),
    "min": (2, lambda a, b: torch.minimum(*_like(a, b))),
    "max": (2, lambda a, b: torch.maximum(*_like(a, b))),
    "select": (3, lambda c, a, b: _where(c != 0, *_like(c, a, b)[1:])),
}
#: The sign of one operand: no name that a tabulated function could have.
_MINUS = "unary -"
_OPERATORS: dict[str, Callable[..., Value]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "^": _power,
    _MINUS: lambda a: -a,
}


@dataclass
class Program:
    """An expression split into coefficients and a function of positions.

    Args:
        text: expression in OpenMM's language.
        static: names whose values do not depend on positions (parameters, global ones too).
        dynamic: names whose values do.
        tables: tabulated functions by name.

    Raises:
        InputError: the expression is invalid or uses an unknown name.
    """

    text: str
    static: Iterable[str]
    dynamic: Iterable[str]
    tables: Mapping[str, Table] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._root = parse(self.text, self.tables)
        known = set(self.static) | set(self.dynamic)
        unknown = variables(self._root) - known
        if unknown:
            raise InputError(
                f"unknown name {sorted(unknown)[0]!r} in the expression {self.text!r}; known are {sorted(known)}"
            )
        self._moving: dict[int, bool] = {}
        self._mark(self._root, set(self.dynamic))
        self._slots: dict[int, Node] = {}
        self._find_slots()

    @property
    def uses(self) -> set[str]:
        """Names of the variables in the expression."""
        return variables(self._root)

    @property
    def n_slots(self) -> int:
        """Number of coefficients which `fold` returns."""
        return len(self._slots)

    def _mark(self, node: Node, dynamic: set[str]) -> bool:
        for known in _upwards(node, self._moving):
            below = [self._mark(arg, dynamic) for arg in known.args]
            self._moving[id(known)] = any(below) or (known.is_variable and known.name[1:] in dynamic)
        return self._moving[id(node)]

    def _find_slots(self) -> None:
        """The largest sub-expressions that parameters alone determine; numbers stay in the code."""
        seen: set[int] = set()
        waiting = [self._root]
        while waiting:
            node = waiting.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if self._moving[id(node)]:
                waiting += reversed(node.args)
            elif node.number is None:
                self._slots[id(node)] = node

    def fold(self, static: Mapping[str, Tensor]) -> list[Tensor]:
        """Coefficients: every maximal sub-expression of parameters.

        Args:
            static: float64 values of the static names, broadcastable to `(rows, 1)`.
        """
        evaluation = _Evaluation(static, self.tables, {})
        return [_as_tensor(evaluation(node)) for node in self._slots.values()]

    def run(self, dynamic: Mapping[str, Tensor], coefficients: Iterable[Tensor]) -> Value:
        """The value of the expression.

        Args:
            dynamic: values of the dynamic names, `(..., rows, lanes)`.
            coefficients: what `fold` returned, in any dtype.

        Returns:
            a tensor, or a number where the expression is one.
        """
        filled: dict[int, Value] = dict(zip(self._slots, coefficients))
        return _Evaluation(dynamic, self.tables, filled)(self._root)


def _upwards(node: Node, known: Mapping[int, Any]) -> list[Node]:
    """What is unknown along the first arguments of a node, from below: a long sum is a chain as deep.

    The condition of a select is below it, too: it is evaluated in any case.
    """
    chain: list[Node] = []
    while id(node) not in known:
        chain.append(node)
        if not node.args:
            break
        node = node.args[0]
    return chain[::-1]


def _as_tensor(value: Value) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((1, 1), value, dtype=torch.float64)


class _Evaluation:
    """One pass over a graph.

    ``select`` evaluates both branches, as it must for a batch. A branch that is not taken may be undefined (the
    root of a negative number); its value is dropped, but a zero gradient times an infinite derivative is NaN.
    Variables inside a branch therefore pass a gate that lets gradients through only where the branch is taken.
    """

    def __init__(self, names: Mapping[str, Tensor], tables: Mapping[str, Table], filled: Mapping[int, Value]) -> None:
        self._names, self._tables, self._filled = names, tables, filled
        self._memo: dict[int, Value] = dict(filled)

    def __call__(self, node: Node) -> Value:
        for known in _upwards(node, self._memo):
            self._memo[id(known)] = self._compute(known)
        return self._memo[id(node)]

    def _compute(self, node: Node) -> Value:
        if node.number is not None:
            return node.number
        if node.is_variable:
            return self._names[node.name[1:]]
        if node.name == "select" and "select" not in self._tables:
            return self._select(*node.args)
        args = [self(arg) for arg in node.args]
        if node.name in _OPERATORS:
            function = _OPERATORS[node.name]
        elif node.name in self._tables:
            alike = _like(*args) if any(isinstance(a, Tensor) for a in args) else [_as_tensor(a) for a in args]
            return self._tables[node.name](*alike)
        else:
            function = FUNCTIONS[node.name][1]
        if all(isinstance(a, float) for a in args):  # a constant: in float64, then a number again
            return float(function(*(torch.tensor(a, dtype=torch.float64) for a in args)))
        return function(*args)

    def _select(self, condition: Node, yes: Node, no: Node) -> Value:
        value = self(condition)
        if isinstance(value, float):
            return self(yes if value != 0 else no)
        taken = value != 0
        branches = _like(value, self._gated(taken)(yes), self._gated(~taken)(no))[1:]
        return _where(taken, *branches)

    def _gated(self, taken: Tensor) -> "_Evaluation":
        names = {
            name: torch.where(taken, value, value.detach()) if value.requires_grad else value
            for name, value in self._names.items()
        }
        return _Evaluation(names, self._tables, self._filled)
