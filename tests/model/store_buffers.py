"""An exhaustive explorer of small concurrent programs on a machine with a store buffer per thread.

A program is text in a subset of Python. Names are registers of its thread; shared memory and the kernel are reached by
these calls alone, each of which is one step that other threads' steps may come before or after:

    x = load(head)             x = load(slot[i])          the thread's own newest buffered store, else memory
    store(armed, 1)            release(head, n)           into the thread's buffer
    fence()                                               waits until its own buffer is empty
    x = exchange(armed, 0)                                waits for that too, then reads and writes memory at once
    ring(bell)                                            puts a token there; doesn't empty the store buffer
    sleep(bell, head != taken)                            poll(2): waits until a token is there
    sleep(bell | other, head != taken)                    the same for two bells
    drain(bell)                                           takes all tokens, and doesn't wait when there is none
    x = either()                                          0 and 1 are both tried
    rest()                                                the application does something else for as long as it likes

A bell is a descriptor: an eventfd(2), or a socket that bytes are sent to. No fence inside the kernel is assumed.

`assert` says what must hold. The second argument of `sleep` is looked at in memory when nothing moves any more: a
thread that still sleeps though it is true has lost a wake-up.

At any moment a buffered store may reach memory, in an order that the machine allows:

    "tso"    x86-64: the order in which they were made (Sewell et al., x86-TSO, CACM 53(7), 2010)
    "weak"   any order, except that stores to one location keep theirs, and a release waits for all before it. So
             do the stores of C11 programs on ARM behave whose loads acquire; reordered loads are not modelled.

`explore` visits every state that any interleaving reaches, and raises `Wrong` with the shortest way to one that is not
right: an assertion that fails; a thread asleep that should not be; a state from which the threads can't come to rest,
each finished, asleep or in `rest()`: they would turn for ever, as in a busy loop. Threads are taken to be scheduled
fairly.
"""

from __future__ import annotations

import ast
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

MACHINES = ("tso", "weak")


class Wrong(AssertionError):
    """A state that must not be, with the steps that lead to it."""


class Store(NamedTuple):
    """A store that has not reached memory."""

    place: int
    value: int
    release: bool


Thread: TypeAlias = tuple[int, tuple[int, ...], tuple[Store, ...]]
"""One thread at one moment: its next step, its registers, its buffer."""

State: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[Thread, ...]]
"""Everything at one moment: memory, bells, threads."""

Move: TypeAlias = tuple[int, int, int]
"""Which thread; which of its buffered stores reaches memory, or -1 for its next step, or REST; what the step gives."""

REST = -2
NOTHING = (0,)
EITHER = (0, 1)

Function = Callable[[tuple[int, ...], tuple[int, ...]], Any]
"""Of a thread's registers and of memory."""


def _nothing(registers: tuple[int, ...], memory: tuple[int, ...]) -> int:
    return 0


@dataclass
class Step:
    """One instruction: a call of the module's text, or "set", "if" (goes to `to` when false), "goto", "assert"."""

    kind: str
    text: str = ""
    place: Function = _nothing
    value: Function = _nothing
    register: int = -1
    to: int = -1


@dataclass(frozen=True)
class Layout:
    """What is shared: memory (locations and their lengths), bells; the programs' constants; what isn't 0 at first."""

    memory: Mapping[str, int]
    bells: tuple[str, ...]
    constants: Mapping[str, int]
    initial: Mapping[str, int]

    def offset(self, name: str) -> int:
        places = list(self.memory)
        return sum(self.memory[other] for other in places[: places.index(name)])


class _Compiler:
    def __init__(self, source: str, layout: Layout) -> None:
        self.layout = layout
        self.steps: list[Step] = []
        self.registers: list[str] = []
        self.loops: list[tuple[int, list[Step]]] = []
        self.lines = source.splitlines()
        self.block(ast.parse(source).body)
        self.steps.append(Step("end", "end"))

    def register(self, name: str) -> int:
        if name in self.layout.memory or name in self.layout.bells or name in self.layout.constants:
            raise SyntaxError(f"{name} is shared: use load or store")
        if name not in self.registers:
            self.registers.append(name)
        return self.registers.index(name)

    def function(self, node: ast.expr, *, memory: bool = False) -> Function:
        """The expression as a function of registers and memory."""
        compiler = self

        class Names(ast.NodeTransformer):
            def visit_Name(self, name: ast.Name) -> ast.expr:
                if name.id in compiler.layout.constants:
                    return ast.Constant(compiler.layout.constants[name.id])
                if memory and name.id in compiler.layout.memory:
                    where, index = "m", compiler.layout.offset(name.id)
                else:
                    where, index = "r", compiler.register(name.id)
                return ast.Subscript(ast.Name(where, ast.Load()), ast.Constant(index), ast.Load())

        whole = ast.parse("lambda r, m: 0", mode="eval")
        assert isinstance(whole.body, ast.Lambda)
        whole.body.body = Names().visit(node)
        function: Function = eval(compile(ast.fix_missing_locations(whole), "<program>", "eval"))
        return function

    def place(self, node: ast.expr) -> Function:
        """Which location `head` or `slot[i]` is."""
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            start, length = self.layout.offset(node.value.id), self.layout.memory[node.value.id]
            index = self.function(node.slice)
            return lambda r, m: start + index(r, m) % length
        assert isinstance(node, ast.Name), ast.unparse(node)
        if node.id in self.layout.bells:
            bell = self.layout.bells.index(node.id)
            return lambda r, m: bell
        start = self.layout.offset(node.id)
        return lambda r, m: start

    def emit(self, kind: str, node: ast.AST, **parts: Any) -> Step:
        step = Step(kind, self.lines[getattr(node, "lineno", 1) - 1].strip(), **parts)
        self.steps.append(step)
        return step

    def call(self, node: ast.Call, register: int = -1) -> None:
        assert isinstance(node.func, ast.Name), ast.unparse(node)
        kind, arguments = node.func.id, node.args
        match kind, len(arguments):
            case ("load" | "ring" | "drain"), 1:
                self.emit(kind, node, place=self.place(arguments[0]), register=register)
            case ("store" | "release" | "exchange"), 2:
                place, value = self.place(arguments[0]), self.function(arguments[1])
                self.emit(kind, node, place=place, value=value, register=register)
            case "sleep", 2:
                names = [name.id for name in ast.walk(arguments[0]) if isinstance(name, ast.Name)]
                bells = tuple(self.layout.bells.index(name) for name in names)
                wrong = self.function(arguments[1], memory=True)
                self.emit(kind, node, place=lambda r, m: bells, value=wrong)
            case ("fence" | "rest" | "either"), 0:
                self.emit(kind, node, register=register)
            case _:
                raise SyntaxError(ast.unparse(node))

    def block(self, nodes: list[ast.stmt]) -> None:
        for node in nodes:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call() as call):
                    self.call(call, self.register(name))
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self.emit("set", node, value=self.function(value), register=self.register(name))
                case ast.Expr(value=ast.Call() as call):
                    self.call(call)
                case ast.Assert(test=test):
                    self.emit("assert", node, value=self.function(test))
                case ast.If(test=test, body=body, orelse=orelse):
                    branch = self.emit("if", node, value=self.function(test))
                    self.block(body)
                    if orelse:
                        leave = self.emit("goto", node)
                        branch.to = len(self.steps)
                        self.block(orelse)
                        leave.to = len(self.steps)
                    else:
                        branch.to = len(self.steps)
                case ast.While(test=test, body=body, orelse=[]):
                    start = len(self.steps)
                    branch = self.emit("if", node, value=self.function(test))
                    self.loops.append((start, [branch]))
                    self.block(body)
                    self.emit("goto", node, to=start)
                    for leave in self.loops.pop()[1]:
                        leave.to = len(self.steps)
                case ast.Break():
                    self.loops[-1][1].append(self.emit("goto", node))
                case ast.Continue():
                    self.emit("goto", node, to=self.loops[-1][0])
                case ast.Pass():
                    pass
                case _:
                    raise SyntaxError(ast.unparse(node))


class Explorer:
    """All states of these programs on one machine."""

    def __init__(self, programs: Mapping[str, str], layout: Layout, machine: str) -> None:
        assert machine in MACHINES
        self.names = list(programs)
        self.weak = machine == "weak"
        compiled = [_Compiler(source, layout) for source in programs.values()]
        self.steps = [one.steps for one in compiled]
        self.registers = [one.registers for one in compiled]
        self.layout = layout
        self._advanced: dict[tuple[int, Thread], Thread | str] = {}

    def advance(self, who: int, thread: Thread, told: list[str] | None = None) -> Thread | str:
        """Run what others can't see, up to the next step that they may see or be seen by; or say what failed.

        A store only goes into the thread's own buffer, and a fence with an empty buffer does nothing: neither is worth
        states of its own, as every order of these and of other threads' steps has the same outcome.
        """
        known = self._advanced.get((who, thread))
        if known is not None and told is None:
            return known
        steps = self.steps[who]
        at, registers, buffer = thread
        result: Thread | str
        while True:
            step = steps[at]
            at += 1
            match step.kind:
                case "set":
                    registers = _with(registers, step.register, int(step.value(registers, ())))
                case "goto":
                    at = step.to
                case "if":
                    if not step.value(registers, ()):
                        at = step.to
                case "store" | "release":
                    store = Store(step.place(registers, ()), int(step.value(registers, ())), step.kind == "release")
                    buffer = (*buffer, store)
                    if told is not None:
                        told.append(f"{step.text}    -> {store.value}, buffered")
                case "fence" if not buffer:
                    if told is not None:
                        told.append(step.text)
                case "assert":
                    if not step.value(registers, ()):
                        values = ", ".join(f"{n}={v}" for n, v in zip(self.registers[who], registers, strict=True))
                        result = f"{step.text} does not hold: {values}"
                        break
                case _:
                    result = (at - 1, registers, buffer)
                    break
        self._advanced[who, thread] = result
        return result

    def first(self) -> State:
        memory = [0] * sum(self.layout.memory.values())
        for name, value in self.layout.initial.items():
            memory[self.layout.offset(name)] = value
        threads = []
        for who, names in enumerate(self.registers):
            ready = self.advance(who, (0, (0,) * len(names), ()))
            assert not isinstance(ready, str), ready
            threads.append(ready)
        return tuple(memory), (0,) * len(self.layout.bells), tuple(threads)

    def leaving(self, buffer: tuple[Store, ...]) -> Iterator[int]:
        """Which buffered stores may reach memory now."""
        if not self.weak:
            yield 0
            return
        seen: set[int] = set()
        for index, store in enumerate(buffer):
            if store.place not in seen and not (store.release and index):
                yield index
            seen.add(store.place)

    def next_of(self, state: State) -> Iterator[tuple[Move, State | str]]:
        """Every next step, and the state after it or what failed."""
        memory, bells, threads = state
        for who, (at, registers, buffer) in enumerate(threads):
            if buffer:
                for index in self.leaving(buffer):
                    store = buffer[index]
                    left = buffer[:index] + buffer[index + 1 :]
                    ready = self.advance(who, (at, registers, left))
                    move = (who, index, 0)
                    if isinstance(ready, str):
                        yield move, ready
                    else:
                        yield move, (_with(memory, store.place, store.value), bells, _with(threads, who, ready))
            step = self.steps[who][at]
            kind = step.kind
            if kind in {"end", "fence"} or (kind == "exchange" and buffer):
                continue
            place = step.place(registers, ())
            new_memory, new_bells = memory, bells
            results: tuple[int, ...] = NOTHING
            match kind:
                case "sleep":
                    if not any(bells[bell] for bell in place):
                        continue
                case "load":
                    value = memory[place]
                    for store in buffer:
                        if store.place == place:
                            value = store.value
                    results = (value,)
                case "exchange":
                    results = (memory[place],)
                    new_memory = _with(memory, place, int(step.value(registers, ())))
                case "ring":
                    new_bells = _with(bells, place, 1)
                case "drain":
                    results = (bells[place],)
                    new_bells = _with(bells, place, 0)
                case "either":
                    results = EITHER
            for result in results:
                after_step = _with(registers, step.register, result) if step.register >= 0 else registers
                ready = self.advance(who, (at + 1, after_step, buffer))
                move = (who, REST if kind == "rest" else -1, result)
                if isinstance(ready, str):
                    yield move, ready
                else:
                    yield move, (new_memory, new_bells, _with(threads, who, ready))

    def called(self, place: int) -> str:
        for name, length in self.layout.memory.items():
            if place < length:
                return f"{name}[{place}]" if length > 1 else name
            place -= length
        raise IndexError(place)

    def lost(self, state: State) -> str | None:
        """Who sleeps though there is something for it, in a state in which nothing moves."""
        memory, _, threads = state
        for who, (at, registers, _) in enumerate(threads):
            step = self.steps[who][at]
            if step.kind == "sleep" and step.value(registers, memory):
                return f"{self.names[who]} sleeps for ever: {step.text}"
        return None

    def explore(self, limit: int = 2_000_000) -> int:
        """Visit every state; how many there are. Raises Wrong at the first that is not right."""
        start = self.first()
        came: dict[State, tuple[State, Move] | None] = {start: None}
        before: dict[State, list[State]] = {}
        quiet: list[State] = []
        todo = deque([start])
        while todo:
            state = todo.popleft()
            moves = rests = False
            for move, after in self.next_of(state):
                if isinstance(after, str):
                    raise Wrong(self.story(came, state, move, after))
                if move[1] == REST:
                    rests = True
                else:
                    moves = True
                    before.setdefault(after, []).append(state)
                if after not in came:
                    came[after] = (state, move)
                    todo.append(after)
            if not moves:
                quiet.append(state)
                wrong = self.lost(state)
                finished = all(self.steps[who][thread[0]].kind == "end" for who, thread in enumerate(state[2]))
                if wrong is None and not rests and not finished:
                    wrong = "nobody can go on"
                if wrong:
                    raise Wrong(self.story(came, state, None, wrong))
            assert len(came) <= limit, f"more than {limit} states: take a smaller program"
        # Backwards from where all is quiet, without the ends of rests: what isn't reached turns for ever.
        settles = set(quiet)
        behind = list(quiet)
        while behind:
            for state in before.get(behind.pop(), ()):
                if state not in settles:
                    settles.add(state)
                    behind.append(state)
        for state in came:
            if state not in settles:
                raise Wrong(self.story(came, state, None, "the threads never come to rest from here"))
        return len(came)

    def told(self, state: State, move: Move) -> list[str]:
        """What happens in this step, and in what its thread does after it unseen."""
        who, index, result = move
        at, registers, buffer = state[2][who]
        if index >= 0:
            lines = [f"(its store of {buffer[index].value} to {self.called(buffer[index].place)} reaches memory)"]
            thread = (at, registers, buffer[:index] + buffer[index + 1 :])
        else:
            step = self.steps[who][at]
            lines = [step.text + (f"    -> {result}" if step.register >= 0 else "")]
            if step.register >= 0:
                registers = _with(registers, step.register, result)
            thread = (at + 1, registers, buffer)
        self.advance(who, thread, lines)
        return [f"{self.names[who]}: {line}" for line in lines]

    def story(self, came: Mapping[State, tuple[State, Move] | None], state: State, move: Move | None, end: str) -> str:
        """The steps that lead to this state, and its end."""
        parts = [[end]]
        if move is not None:
            parts.append(self.told(state, move))
        link = came[state]
        while link is not None:
            parts.append(self.told(*link))
            link = came[link[0]]
        for who, names in reversed(list(enumerate(self.registers))):
            lines: list[str] = []
            self.advance(who, (0, (0,) * len(names), ()), lines)
            parts.append([f"{self.names[who]}: {line}" for line in lines])
        return "\n".join(["", *(line for part in reversed(parts) for line in part)])


def _with(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])
