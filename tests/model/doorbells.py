"""The protocol of the shared-memory wire's doorbells, as programs for `store_buffers`, and ways to break it.

docs/design/shared-memory.md has the argument. Here it is without sizes: a record is one slot. One direction is `head`,
`tail`, `slot`, the receiver's flag `armed` ("I sleep for data") and the sender's flag `room` ("I sleep for room"). A
lone producer sleeps on `bell_p`, a lone consumer on `bell_c`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from textwrap import dedent, indent

from store_buffers import Explorer, Layout

RING = {"head": 1, "tail": 1, "slot": 0, "armed": 1, "room": 1}
"""The locations of one direction; the slots' number is filled in."""

# One side alone -----------------------------------------------------------------------------------------------------

PRODUCER = """
sent = 0
seen = 0
while sent < MESSAGES:
    rest()
    while sent - seen == SLOTS:
        seen = load(tail)
        if sent - seen < SLOTS:
            break
        store(room, 1)
        fence()                                     # the sender's, before it looks again
        seen = load(tail)                           # looks again
        if sent - seen < SLOTS:
            break
        sleep(bell_p, sent - tail < SLOTS)
        drain(bell_p)
    store(slot[sent], sent + 1)
    sent = sent + 1
    release(head, sent)
    fence()                                         # the producer's
    flag = load(armed)
    if flag:
        flag = exchange(armed, 0)
        if flag:
            ring(bell_c)
"""

CONSUMER = """
taken = 0
seen = 0
looked = 0
while taken < MESSAGES:
    if seen == taken:
        seen = load(head)
        if seen == taken:
            store(armed, 1)
            fence()                                 # the consumer's
            seen = load(head)                       # looks again
            if seen == taken:
                ABANDON
                sleep(bell_c, head != taken)
                drain(bell_c)
                continue
    value = load(slot[taken])
    assert value == taken + 1
    taken = taken + 1
    release(tail, taken)
    if taken == seen or taken - looked >= QUARTER:
        looked = taken
        fence()                                     # the consumer's, after it made room
        flag = load(room)
        if flag:
            flag = exchange(room, 0)
            if flag:
                ring(bell_p)
"""

# The receive was cancelled between arming and sleeping; the flag stays. The event loop may empty the bell meanwhile, as
# nobody waits. A later receive begins from the start.
ABANDON = """
gone = either()
if gone:
    rest()
    gone = either()
    if gone:
        drain(bell_c)
    gone = 0
    continue
"""

# Both directions ----------------------------------------------------------------------------------------------------

# An event loop's endpoint: one thread that waits for data and for room at once, on one bell. {o} is the direction that
# it sends in, {i} the one it receives from.
ENDPOINT = """
sent = 0
taken = 0
while sent < {sends} or taken < {takes}:
    FIRST
    SECOND
    if taken < {takes}:
        store(armed_{i}, 1)
    if sent < {sends}:
        store(room_{o}, 1)
    fence()
    if taken < {takes}:
        seen = load(head_{i})
        if seen != taken:
            continue
    if sent < {sends}:
        seen = load(tail_{o})                       # looks for room again
        if sent - seen < SLOTS:
            continue
    sleep(bell_{me}, taken < {takes} and head_{i} != taken or sent < {sends} and sent - tail_{o} < SLOTS)
    drain(bell_{me})
"""

TAKE = """
if taken < {takes}:
    seen = load(head_{i})
    if seen != taken:
        value = load(slot_{i}[taken])
        assert value == taken + 1
        taken = taken + 1
        release(tail_{i}, taken)
        fence()
        flag = load(room_{i})
        if flag:
            flag = exchange(room_{i}, 0)
            if flag:
                ring(bell_{peer})
        continue
"""

PUT = """
if sent < {sends}:
    seen = load(tail_{o})
    if sent - seen < SLOTS:
        store(slot_{o}[sent], sent + 1)
        sent = sent + 1
        release(head_{o}, sent)
        fence()
        flag = load(armed_{o})
        if flag:
            flag = exchange(armed_{o}, 0)
            if flag:
                ring(bell_{peer})
        continue
"""

# The blocking front: a receiver and a sender in two threads that sleep on the one bell that the peer rings, and on one
# of their own, by which each gives the other a token that it took. `here_r` and `here_s` are not shared with the peer:
# which of the two really waits.
AWAKE = """
drain(own_{me})
drain(bell_{me})
other = load(here_{other})
if other:
    flag = load({flag})
    if flag == 0:                                   # the other was rung: its token may be the one that was taken
        ring(own_{me})
"""

RECEIVER = """
taken = 0
while taken < {takes}:
    seen = load(head_{i})
    if seen == taken:
        release(here_r, 1)
        release(armed_{i}, 1)
        fence()
        seen = load(head_{i})
        if seen == taken:
            TIMEOUT
            sleep(bell_{me} | own_{me}, head_{i} != taken)
            AWAKE
            continue
    store(here_r, 0)
    value = load(slot_{i}[taken])
    assert value == taken + 1
    taken = taken + 1
    release(tail_{i}, taken)
    fence()
    flag = load(room_{i})
    if flag:
        flag = exchange(room_{i}, 0)
        if flag:
            ring(bell_{peer})
"""

# The ring is full when it begins: message 1 is in it.
SENDER = """
sent = 1
while sent < {sends}:
    seen = load(tail_{o})
    if sent - seen == SLOTS:
        release(here_s, 1)
        release(room_{o}, 1)
        fence()
        seen = load(tail_{o})
        if sent - seen == SLOTS:
            sleep(bell_{me} | own_{me}, sent - tail_{o} < SLOTS)
            AWAKE
            continue
    store(here_s, 0)
    store(slot_{o}[sent], sent + 1)
    sent = sent + 1
    release(head_{o}, sent)
    fence()
    flag = load(armed_{o})
    if flag:
        flag = exchange(armed_{o}, 0)
        if flag:
            ring(bell_{peer})
"""

# A blocking receive that timed out: it waits no more, its flag stays, and the thread does something else.
TIMEOUT = """
gone = either()
if gone:
    store(here_r, 0)
    rest()
    continue
"""


def filled(text: str, **blocks: str) -> str:
    """The program with its words in capitals replaced by blocks, indented as the word is."""
    lines = []
    for line in dedent(text).strip().splitlines():
        word = line.strip()
        lines.append(indent(blocks[word].strip(), line[: -len(word)]) if word in blocks else line)
    return "\n".join(line for line in lines if line.strip())


@dataclass(frozen=True)
class Case:
    """Programs that run together, and what they share."""

    programs: Mapping[str, str]
    memory: Mapping[str, int]
    bells: tuple[str, ...]
    constants: Mapping[str, int]
    initial: Mapping[str, int] = field(default_factory=dict)

    def changed(self, program: str, old: str, new: str) -> Case:
        """With some lines of one program replaced; `old` and `new` are without the indentation of their place."""
        lines = self.programs[program].splitlines()
        told = [" ".join(line.split()) for line in lines]
        wanted = [" ".join(line.split()) for line in dedent(old).strip().splitlines()]
        places = [at for at in range(len(lines)) if told[at : at + len(wanted)] == wanted]
        assert len(places) == 1, f"{old!r} occurs {len(places)} times in {program}:\n{self.programs[program]}"
        at = places[0]
        margin = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
        lines[at : at + len(wanted)] = indent(dedent(new).strip(), margin).splitlines()
        return replace(self, programs={**self.programs, program: "\n".join(lines)})

    def explore(self, machine: str) -> int:
        return Explorer(self.programs, Layout(self.memory, self.bells, self.constants, self.initial), machine).explore()


def one_way(messages: int, slots: int, *, quarter: int = 1, abandon: bool = False) -> Case:
    """One producer and one consumer, each with a bell of its own."""
    return Case(
        {"producer": filled(PRODUCER), "consumer": filled(CONSUMER, ABANDON=ABANDON if abandon else "pass")},
        {**RING, "slot": slots},
        ("bell_p", "bell_c"),
        {"MESSAGES": messages, "SLOTS": slots, "QUARTER": quarter},
    )


def _both_ways() -> dict[str, int]:
    return {f"{name}_{way}": size or 1 for way in ("ab", "ba") for name, size in RING.items()}


def endpoint(*, sends: int, takes: int, o: str, i: str, me: str, peer: str, first: str, second: str) -> str:
    return filled(ENDPOINT, FIRST=first, SECOND=second).format(sends=sends, takes=takes, o=o, i=i, me=me, peer=peer)


def two_endpoints(a_sends: int, b_sends: int) -> Case:
    """Two event loops that send to each other through rings of one slot."""
    a = endpoint(sends=a_sends, takes=b_sends, o="ab", i="ba", me="a", peer="b", first=TAKE, second=PUT)
    b = endpoint(sends=b_sends, takes=a_sends, o="ba", i="ab", me="b", peer="a", first=TAKE, second=PUT)
    return Case({"a": a, "b": b}, _both_ways(), ("bell_a", "bell_b"), {"SLOTS": 1})


def two_threads(sends: int, takes: int, *, timeout: bool = False) -> Case:
    """A receiver and a sender in two threads on one bell; their peer is an event loop that rests before it receives."""
    receiver = RECEIVER.format(takes=takes, i="ba", me="a", peer="b")
    sender = SENDER.format(sends=sends, o="ab", me="a", peer="b")
    programs = {
        "receiver": filled(
            receiver,
            AWAKE=AWAKE.format(me="a", other="s", flag="room_ab"),
            TIMEOUT=TIMEOUT if timeout else "pass",
        ),
        "sender": filled(sender, AWAKE=AWAKE.format(me="a", other="r", flag="armed_ba")),
        "peer": endpoint(
            sends=takes, takes=sends, o="ba", i="ab", me="b", peer="a", first=PUT, second=f"rest()\n{TAKE.strip()}"
        ),
    }
    memory = {**_both_ways(), "here_r": 1, "here_s": 1}
    return Case(programs, memory, ("bell_a", "own_a", "bell_b"), {"SLOTS": 1}, {"head_ab": 1, "slot_ab": 1})
