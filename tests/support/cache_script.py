"""A small language of scripts for cache tests, and what runs them.

A file has any number of scripts.  Each begins with its name in brackets and a comment with the rule that it shows::

    [put-too-often]
    # Releasing a buffer more often than it is held is an error.
    read 3
    put 3
    error hold naming 3: put 3

One instruction stands on a line; case matters, indentation does not, ``#`` begins a comment.  Three things belong to
the language itself:

``needs NUMBER``
    The first line of a script for caches with room for that many blocks, and not for smaller ones.
``for VARIABLE in BEGIN .. END [step STEP]`` ... ``end``
    repeats what is between, END excluded.  Loops nest.
``error KIND [naming NUMBER, ...]: INSTRUCTION``
    The instruction must raise that kind of error, and its message must name the numbers.

The other instructions belong to the machine that runs the script: a method with the decorator :func:`instruction`
says how its line looks.  In such a form ``<block>`` is an expression, ``<name:word>`` a word, and what is in brackets
may be missing.  Expressions are whole numbers, variables, ``+ - * // %`` and parentheses.

:class:`ScriptError` says that the script is wrong, :class:`ScriptFailure` that the cache is.  Both name the line.
"""

from __future__ import annotations

import ast
import operator
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from pathlib import Path

    Expression = Callable[[Mapping[str, int]], int]

Method = TypeVar("Method", bound="Callable[..., None]")


class ScriptError(Exception):
    """The script is wrong: it cannot be understood, or asks for what the language does not allow."""


class ScriptFailure(AssertionError):
    """The cache did not do what the script says."""


# Expressions

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def _expression(text: str, scope: Collection[str]) -> Expression:
    """Compile an expression over the variables in *scope*."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise ScriptError(f"{text!r} is no expression") from None
    return _compiled(tree, text, scope)


def _compiled(node: ast.expr, text: str, scope: Collection[str]) -> Expression:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        number = node.value
        return lambda _: number
    if isinstance(node, ast.Name):
        name = node.id
        if name not in scope:
            raise ScriptError(f"there is no variable {name}")
        return lambda variables: variables[name]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        operand = _compiled(node.operand, text, scope)
        return lambda variables: -operand(variables)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _compiled(node.left, text, scope), _compiled(node.right, text, scope)
        combine = _OPERATORS[type(node.op)]
        return lambda variables: combine(left(variables), right(variables))
    raise ScriptError(f"{text!r} is no expression")


_RELATIONS: dict[str, Callable[[int, int], bool]] = {"=": operator.eq, ">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Condition:
    """``NAME = VALUE``, or with ``>=`` or ``<=``; the value is still an expression."""

    name: str
    relation: str
    value: Expression


def _conditions(text: str, scope: Collection[str]) -> list[Condition]:
    conditions = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*(=|>=|<=)\s*([^=<>]+)", part)
        if match is None:
            raise ScriptError(f"{part.strip()!r} is no condition: NAME = VALUE, or >= or <=")
        conditions.append(Condition(match[1], match[2], _expression(match[3], scope)))
    return conditions


# Forms of instructions


class _Form:
    """How the line of an instruction looks: a regular expression made of the text given to :func:`instruction`."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.keyword = text.partition(" ")[0]
        self._kinds: dict[str, str] = {}
        self._flags: list[str] = []
        pattern = re.sub(r"\[(\w+)\]", self._flag, text)
        pattern = pattern.replace("..", r"\.\.").replace(" [", "(?: ").replace("]", ")?")
        self._pattern = re.compile(re.sub(r"<(\w+)(?::(\w+))?>", self._operand, pattern))

    def _flag(self, match: re.Match[str]) -> str:
        """A word in brackets is an operand too: whether it is there."""
        self._flags.append(match[1])
        return f"[<{match[1]}:flag>]"

    def _operand(self, match: re.Match[str]) -> str:
        name, kind = match[1], match[2] or "expression"
        self._kinds[name] = kind
        patterns = {"word": r"\w+", "flag": name, "expression": ".+?", "conditions": ".+"}
        return f"(?P<{name}>{patterns[kind]})"

    def operands(self, line: str, scope: Collection[str]) -> dict[str, Any] | None:
        """Return the operands in *line*, compiled, or None if it does not have this form."""
        match = self._pattern.fullmatch(line)
        if match is None:
            return None
        found: dict[str, Any] = {}
        for name, text in match.groupdict().items():
            kind = self._kinds[name]
            if kind == "flag":
                found[name] = text is not None
            elif text is None:
                found[name] = None
            elif kind == "expression":
                found[name] = _expression(text, scope)
            elif kind == "conditions":
                found[name] = _conditions(text, scope)
            else:
                found[name] = text
        return found


def instruction(form: str) -> Callable[[Method], Method]:
    """Make a method of a machine the instruction whose lines look like *form*.

    The method gets the operands by name: expressions as numbers, words as text, words alone in brackets as booleans,
    and None for what is missing.
    """

    def mark(method: Method) -> Method:
        method.__dict__["form"] = _Form(form)
        return method

    return mark


# Scripts


@dataclass(frozen=True)
class _Step:
    """One instruction, ready to run; ``kind`` is set if it must raise an error of that kind."""

    line: int
    text: str
    method: str
    operands: dict[str, Any]
    kind: str | None = None
    named: tuple[Expression, ...] = ()


@dataclass(frozen=True)
class _Loop:
    line: int
    text: str
    variable: str
    begin: Expression
    end: Expression
    step: Expression
    body: list[_Step | _Loop]


@dataclass(frozen=True)
class Script:
    """What a section of a file says; ``rule`` is its first comment."""

    name: str
    rule: str
    source: str
    body: list[_Step | _Loop]
    needs: int = 0
    """How many blocks a cache must have room for, if it is to run this."""

    def uses(self, *instructions: str) -> bool:
        """Return whether an instruction of one of these names is in the script."""
        return _uses(self.body, instructions)


def _uses(body: list[_Step | _Loop], instructions: Collection[str]) -> bool:
    return any(
        _uses(item.body, instructions) if isinstance(item, _Loop) else item.method in instructions for item in body
    )


_LOOP = re.compile(r"for (\w+) in (.+?) \.\. (.+?)(?: step (.+))?")
_NEEDS = re.compile(r"needs (\d+)")
_ERROR = re.compile(r"error (\w+)(?: naming ([^:]+))?: (.+)")


class _Parser:
    """Reads one section.  The lines it is given have neither comments nor indentation."""

    def __init__(self, source: str, machine: type[Machine]) -> None:
        self._source = source
        self._machine = machine
        self._scope = list(machine.VARIABLES)

    def body(self, lines: Iterator[tuple[int, str]], opened_by: tuple[int, str] | None = None) -> list[_Step | _Loop]:
        """Read up to the end of the loop whose first line is given, or of the section."""
        found: list[_Step | _Loop] = []
        for number, line in lines:
            try:
                if line == "end":
                    if opened_by is None:
                        raise ScriptError("end without a loop")
                    return found
                if not line.startswith("for "):
                    found.append(self._step(number, line))
                    continue
                variable, begin, end, step = self._loop(line)
            except ScriptError as error:
                raise ScriptError(f"{self._source}:{number}: {line}: {error}") from None
            self._scope.append(variable)
            body = self.body(lines, (number, line))
            self._scope.remove(variable)
            found.append(_Loop(number, line, variable, begin, end, step, body))
        if opened_by is not None:
            raise ScriptError(f"{self._source}:{opened_by[0]}: {opened_by[1]}: a loop without end")
        return found

    def _loop(self, line: str) -> tuple[str, Expression, Expression, Expression]:
        match = _LOOP.fullmatch(line)
        if match is None:
            raise ScriptError("expected: for VARIABLE in BEGIN .. END [step STEP]")
        variable = match[1]
        if variable in self._scope:
            raise ScriptError(f"there is a variable {variable} already")
        begin, end, step = (_expression(text, self._scope) for text in (match[2], match[3], match[4] or "1"))
        return variable, begin, end, step

    def _step(self, number: int, line: str) -> _Step:
        kind = None
        named: tuple[Expression, ...] = ()
        text = line
        if line.startswith("error "):
            match = _ERROR.fullmatch(line)
            if match is None:
                raise ScriptError("expected: error KIND [naming NUMBER, ...]: INSTRUCTION")
            kind, text = match[1], match[3]
            if kind not in self._machine.ERRORS:
                raise ScriptError(f"there is no kind of error {kind}: {', '.join(self._machine.ERRORS)}")
            named = tuple(_expression(part, self._scope) for part in (match[2] or "").split(",") if part)
        keyword = text.partition(" ")[0]
        forms = []
        for method, form in self._machine.instructions.items():
            if form.keyword == keyword:
                operands = form.operands(text, self._scope)
                if operands is not None:
                    return _Step(number, line, method, operands, kind, named)
                forms.append(form.text)
        raise ScriptError(f"expected: {' or '.join(forms)}" if forms else f"there is no instruction {keyword}")


def parse(text: str, machine: type[Machine], source: str = "script") -> list[Script]:
    """Return the scripts in *text*, which must have instructions of *machine*.

    :param source: the name of the file, for messages
    :raises ScriptError: it cannot be understood; the message names the line
    """
    sections: list[tuple[str, int, list[str], list[tuple[int, str]]]] = []
    for number, raw in enumerate(text.splitlines(), 1):
        code, _, comment = raw.partition("#")
        line = " ".join(code.split())
        if line.startswith("["):
            name = line.strip("[]")
            if line != f"[{name}]" or not re.fullmatch(r"[a-z0-9-]+", name):
                raise ScriptError(f"{source}:{number}: {line}: a name has small letters, digits and hyphens")
            if any(name == other for other, *_ in sections):
                raise ScriptError(f"{source}:{number}: {line}: there is a script of that name already")
            sections.append((name, number, [], []))
        elif line:
            if not sections:
                raise ScriptError(f"{source}:{number}: {line}: an instruction before the first [name]")
            sections[-1][3].append((number, line))
        elif sections and not sections[-1][3] and comment:
            sections[-1][2].append(comment.strip())
    scripts = []
    for name, number, rule, lines in sections:
        if not rule:
            raise ScriptError(f"{source}:{number}: [{name}]: a comment must say which rule it shows")
        needs = _NEEDS.fullmatch(lines[0][1]) if lines else None
        body = _Parser(source, machine).body(iter(lines[1:] if needs else lines))
        scripts.append(Script(name, " ".join(rule), source, body, int(needs[1]) if needs else 0))
    return scripts


def load(directory: Path, machine: type[Machine]) -> list[Script]:
    """Return the scripts of every text file in *directory*."""
    return [
        script for path in sorted(directory.glob("*.txt")) for script in parse(path.read_text(), machine, path.name)
    ]


# Running


class Machine:
    """Runs scripts: loops, expected errors and the places of failures.  A subclass has the instructions.

    :param variables: a value for each name in ``VARIABLES``
    """

    VARIABLES: ClassVar[tuple[str, ...]] = ()
    """What every script may use in expressions."""
    ERRORS: ClassVar[dict[str, Callable[[Exception], bool]]] = {}
    """For each word that may follow ``error``, whether an exception is of that kind."""
    instructions: ClassVar[dict[str, _Form]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.instructions = dict(cls.instructions)
        for name, method in vars(cls).items():
            if isinstance(form := getattr(method, "form", None), _Form):
                cls.instructions[name] = form

    def __init__(self, variables: Mapping[str, int]) -> None:
        self._variables = dict(variables)

    def run(self, script: Script) -> None:
        """Run a script to its end, and then what :meth:`finish` asks for.

        :raises ScriptFailure: the cache did not do what the script says
        :raises ScriptError: the script asks for what the language does not allow
        """
        try:
            self._run(script, script.body)
            try:
                self.finish()
            except Exception as error:
                place = f"{script.source}: [{script.name}]: at its end"
                raise _kind_of(error)(f"{place}: {_described(error)}") from error
        finally:
            self.clean_up()

    def _run(self, script: Script, body: list[_Step | _Loop]) -> None:
        variables = self._variables
        for item in body:
            values = range(0)
            try:
                if isinstance(item, _Step):
                    self._do(item)
                else:
                    values = self._values(item)
            except Exception as error:
                now = ", ".join(f"{name} = {value}" for name, value in variables.items())
                place = f"{script.source}:{item.line}: [{script.name}]: {item.text}"
                raise _kind_of(error)(f"{place}: {_described(error)} (with {now})") from error
            if isinstance(item, _Loop):
                for variables[item.variable] in values:
                    self._run(script, item.body)
                variables.pop(item.variable, None)

    def value(self, expression: Expression) -> int:
        """Evaluate an expression with the variables as they are now."""
        try:
            return expression(self._variables)
        except ZeroDivisionError:
            raise ScriptError("a division by zero") from None

    def _values(self, loop: _Loop) -> range:
        step = self.value(loop.step)
        if step == 0:
            raise ScriptError("the step is zero")
        return range(self.value(loop.begin), self.value(loop.end), step)

    def _do(self, step: _Step) -> None:
        operands = {name: self.value(value) if callable(value) else value for name, value in step.operands.items()}
        named = [self.value(number) for number in step.named]
        call = getattr(self, step.method)
        if step.kind is None:
            call(**operands)
            return
        try:
            call(**operands)
        except (ScriptError, ScriptFailure):
            raise
        except Exception as error:
            if not self.ERRORS[step.kind](error):
                raise
            missing = [number for number in named if not re.search(rf"\b{number}\b", str(error))]
            if missing:
                raise ScriptFailure(f"the error does not name {missing}: {error}") from error
            return
        raise ScriptFailure(f"no {step.kind} error was raised")

    def require(self, conditions: list[Condition], numbers: Callable[[str], int]) -> None:
        """Check conditions on what *numbers* says of each name."""
        for condition in conditions:
            actual, wanted = numbers(condition.name), self.value(condition.value)
            if not _RELATIONS[condition.relation](actual, wanted):
                raise ScriptFailure(f"{condition.name} is {actual}, not {condition.relation} {wanted}")

    def finish(self) -> None:
        """Check what must hold at the end of every script."""

    def clean_up(self) -> None:
        """Give everything back, also after a failure.  Must not raise."""


def _kind_of(error: Exception) -> type[Exception]:
    """Whose fault it is: anything but a ScriptError is the cache's."""
    return ScriptError if isinstance(error, ScriptError) else ScriptFailure


def _described(error: Exception) -> str:
    return str(error) if isinstance(error, ScriptError | ScriptFailure) else f"raised {type(error).__name__}: {error}"
