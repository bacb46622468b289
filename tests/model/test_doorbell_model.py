"""No wake-up of the shared-memory wire is lost, and each part of its protocol is needed.

The protocol as it is must be right in every interleaving on both machines; with one part deleted or changed, the
explorer must find a way in which it goes wrong. docs/design/shared-memory.md has the argument that this checks.
"""

from __future__ import annotations

import pytest
from doorbells import Case, one_way, two_endpoints, two_threads
from store_buffers import MACHINES, Explorer, Layout, Wrong

INTACT = {
    "one slot": one_way(3, 1),
    "two slots": one_way(4, 2),
    "two slots, room told when empty": one_way(4, 2, quarter=2),
    "three slots, room told when empty": one_way(5, 3, quarter=3),
    "abandoned receives": one_way(3, 1, abandon=True),
    "abandoned receives, two slots": one_way(4, 2, quarter=2, abandon=True),
    "a flag that is cleared when the second look finds data": one_way(3, 1, abandon=True).changed(
        "consumer", "value = load(slot[taken])", "store(armed, 0)\nvalue = load(slot[taken])"
    ),
    "event loops": two_endpoints(2, 1),
    "event loops, both rings full": two_endpoints(2, 2),
    "two threads on one bell": two_threads(2, 1),
    "two threads on one bell, time-outs": two_threads(2, 1, timeout=True),
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("case", INTACT.values(), ids=INTACT)
def test_no_wake_up_is_lost(case: Case, machine: str) -> None:
    assert case.explore(machine) > 100


LOST = "sleeps for ever"
TORN = "does not hold"
BUSY = "never come to rest"

# What is broken: in which programs, whose line, what it becomes, what comes of it, on which machines it shows.
BROKEN = {
    "no fence after publishing": (
        one_way(2, 1), "producer", "fence() # the producer's", "pass", LOST, MACHINES),
    "no fence after arming": (
        one_way(2, 1), "consumer", "fence() # the consumer's", "pass", LOST, MACHINES),
    "no second look for data": (
        one_way(2, 1), "consumer", "seen = load(head) # looks again", "pass", LOST, MACHINES),
    "looks before it arms": (
        one_way(2, 1), "consumer",
        "store(armed, 1)\nfence() # the consumer's\nseen = load(head) # looks again",
        "seen = load(head)\nstore(armed, 1)\nfence()", LOST, MACHINES),
    "looks at the flag before it publishes": (
        one_way(2, 1), "producer",
        "release(head, sent)\nfence() # the producer's\nflag = load(armed)",
        "flag = load(armed)\nrelease(head, sent)\nfence()", LOST, MACHINES),
    "published before it is written": (
        one_way(2, 2), "producer",
        "store(slot[sent], sent + 1)\nsent = sent + 1\nrelease(head, sent)",
        "sent = sent + 1\nrelease(head, sent)\nstore(slot[sent - 1], sent)", TORN, MACHINES),
    "published without release": (
        one_way(2, 2), "producer", "release(head, sent)", "store(head, sent)", TORN, ("weak",)),
    "given back before it is read": (
        one_way(3, 1), "consumer",
        "value = load(slot[taken])\nassert value == taken + 1\ntaken = taken + 1\nrelease(tail, taken)",
        "taken = taken + 1\nrelease(tail, taken)\nvalue = load(slot[taken - 1])\nassert value == taken",
        TORN, MACHINES),
    "load and store for the exchange of armed": (
        one_way(2, 1), "producer", "flag = exchange(armed, 0)", "store(armed, 0)", LOST, MACHINES),
    "load and store for the exchange of room": (
        one_way(3, 1), "consumer", "flag = exchange(room, 0)", "store(room, 0)", LOST, MACHINES),
    "the bell is emptied after the look": (
        one_way(2, 1), "consumer", "drain(bell_c)\ncontinue",
        "seen = load(head)\ndrain(bell_c)\nif seen == taken:\n    sleep(bell_c, head != taken)\ncontinue",
        LOST, MACHINES),
    "the bell is never emptied": (
        one_way(2, 1), "consumer", "drain(bell_c)", "pass", BUSY, MACHINES),
    "sleeps again without arming": (
        one_way(2, 1, abandon=True), "consumer", "store(armed, 1)",
        "if sleeps == 0:\n    store(armed, 1)\n    sleeps = 1",
        LOST, MACHINES),
    "no fence after wanting room": (
        one_way(2, 1), "producer", "fence() # the sender's, before it looks again", "pass", LOST, MACHINES),
    "no second look for room": (
        one_way(2, 1), "producer", "seen = load(tail) # looks again", "pass", LOST, MACHINES),
    "no fence after making room": (
        one_way(2, 1), "consumer", "fence() # the consumer's, after it made room", "pass", LOST, MACHINES),
    "looks whether room is wanted before it makes room": (
        one_way(2, 1).changed("consumer", "release(tail, taken)", "before = load(room)\nrelease(tail, taken)"),
        "consumer",
        "fence() # the consumer's, after it made room\nflag = load(room)",
        "flag = before", LOST, MACHINES),
    "an emptied ring is not told": (
        one_way(3, 2, quarter=9), "consumer", "if taken == seen or taken - looked >= QUARTER:",
        "if taken - looked >= QUARTER:", LOST, MACHINES),
    "an event loop that looks only for data": (
        two_endpoints(2, 1), "a", "seen = load(tail_ab) # looks for room again", "seen = sent - SLOTS", LOST, MACHINES),
    "an event loop that arms only for data": (
        two_endpoints(2, 1), "a", "store(room_ab, 1)", "pass", LOST, MACHINES),
    "one thread takes the other's token": (
        two_threads(2, 1), "receiver", "if flag == 0: # the other was rung: its token may be the one that was taken",
        "if flag < 0:", LOST, MACHINES),
    "one thread looks at the other, then empties the bell": (
        two_threads(2, 1), "receiver", "drain(bell_a)\nother = load(here_s)",
        "other = load(here_s)\nflag = 1\nif other:\n    flag = load(room_ab)\nif flag:\n    drain(bell_a)\nother = 0",
        LOST, MACHINES),
    "tokens are kept for a thread that no longer waits": (
        two_threads(2, 1, timeout=True), "receiver", "store(here_r, 0)\nrest()", "rest()", BUSY, MACHINES),
}  # fmt: skip


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_each_part_is_needed(broken: tuple[Case, str, str, str, str, tuple[str, ...]], machine: str) -> None:
    case, program, old, new, outcome, shows = broken
    changed = case.changed(program, old, new)
    if machine in shows:
        with pytest.raises(Wrong, match=outcome):
            changed.explore(machine)
    else:
        changed.explore(machine)


def explore(machine: str, memory: str, **programs: str) -> int:
    layout = Layout(dict.fromkeys(memory.split(), 1), ("bell",), {}, {})
    return Explorer(programs, layout, machine).explore()


# The machines themselves, by the litmus tests that tell them apart (Alglave et al., Herding Cats, TOPLAS 36(2), 2014).
# `assert` in the last program of each looks at what both saw.
STORE_BUFFERING = {
    "a": "store(x, 1)\nFENCE\nr = load(y)\nstore(saw, 1 + r)\nfence()",
    "b": "store(y, 1)\nFENCE\nr = load(x)\nfence()\nother = load(saw)\nassert other != 1 or r == 1",
}
MESSAGE_PASSING = {
    "a": "store(x, 1)\nSTORE(y, 1)",
    "b": "r = load(y)\nother = load(x)\nassert not r or other",
}


@pytest.mark.parametrize("machine", MACHINES)
def test_stores_wait_in_buffers_and_fences_empty_them(machine: str) -> None:
    with pytest.raises(Wrong, match=TORN):
        explore(machine, "x y saw", **{k: v.replace("FENCE", "pass") for k, v in STORE_BUFFERING.items()})
    explore(machine, "x y saw", **{k: v.replace("FENCE", "fence()") for k, v in STORE_BUFFERING.items()})


def test_only_the_weak_machine_reorders_stores() -> None:
    plain = {k: v.replace("STORE", "store") for k, v in MESSAGE_PASSING.items()}
    explore("tso", "x y", **plain)
    with pytest.raises(Wrong, match=TORN):
        explore("weak", "x y", **plain)
    explore("weak", "x y", **{k: v.replace("STORE", "release") for k, v in MESSAGE_PASSING.items()})


@pytest.mark.parametrize("machine", MACHINES)
def test_a_thread_sees_its_own_stores_first(machine: str) -> None:
    explore(machine, "x", a="store(x, 1)\nr = load(x)\nassert r == 1\nstore(x, 2)\nr = load(x)\nassert r == 2")


@pytest.mark.parametrize("machine", MACHINES)
def test_an_exchange_is_one_step(machine: str) -> None:
    taker = "r = exchange(x, 1)\nif r == 0:\n    o = exchange(won, 1)\n    assert o == 0"
    assert explore(machine, "x won", a=taker, b=taker)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_busy_loop_is_found(machine: str) -> None:
    with pytest.raises(Wrong, match=BUSY):
        explore(machine, "x", a="r = 0\nwhile r == 0:\n    r = load(x)", b="rest()\nstore(x, 1)")
    assert explore(machine, "x", a="r = 0\nwhile r == 0:\n    r = load(x)", b="store(x, 1)")


def test_the_way_to_a_wrong_state_is_told() -> None:
    with pytest.raises(Wrong) as caught:
        one_way(2, 1).changed("producer", "fence() # the producer's", "pass").explore("tso")
    told = str(caught.value)
    assert "producer: (its store of 1 to head reaches memory)" in told
    assert told.splitlines()[-1].startswith("consumer sleeps for ever")
