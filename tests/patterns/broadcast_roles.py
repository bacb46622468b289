"""What peers of the broadcast tests can be asked to do: each runs in the peer, on the blocking front."""

from __future__ import annotations

import contextlib
import os
import random
from typing import Any

from conformance.peer import PeerSide
from conformance.roles import describe, number_of

import anywire


def take_in_place(peer: PeerSide, count: int) -> list[int]:
    """The numbers of the next messages, each read in place; the views are kept."""
    views = peer.kept.setdefault("views", [])
    for _ in range(count):
        views.append(peer.channel.recv(copy=False))
    return look_again(peer)[-count:]


def look_again(peer: PeerSide) -> list[int]:
    """The numbers of the messages that are kept: whole, still."""
    return [number_of(view) for view in peer.kept["views"]]


def let_go(peer: PeerSide, count: int | None = None) -> None:
    """Give the memory of the oldest messages that are kept back."""
    views = peer.kept["views"]
    for view in views[:count]:
        view.release()
    del views[:count]


def in_place_to_the_end(peer: PeerSide) -> list[int]:
    """The numbers of all messages, each read in place and given back."""
    numbers = []
    while True:
        try:
            with peer.channel.recv(copy=False) as view:
                numbers.append(number_of(view))
        except anywire.EndOfChannel:
            return numbers


def in_place_with_gaps(peer: PeerSide) -> tuple[list[int], list[tuple[int, int]], dict[str, Any]]:
    """As `pattern_roles.take_runs`, each message read in place and given back."""
    numbers: list[int] = []
    gaps: list[tuple[int, int]] = []
    while True:
        try:
            with peer.channel.recv(copy=False) as view:
                numbers.append(number_of(view))
        except anywire.MessagesLost as error:
            gaps.append((len(numbers), error.lost))
        except anywire.AnywireError as error:
            return numbers, gaps, {**describe(error), "counted": peer.channel.lost}


def shared_with_others() -> list[tuple[int, int, str]]:
    """(first address, bytes, name) of this process's memory that others see too and that it may write."""
    found = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            place, rights, *_, name = line.split(maxsplit=5)
            if "anywire-shm" in name and rights.startswith("rw-s"):
                first, last = (int(part, 16) for part in place.split("-"))
                found.append((first, last - first, name))
    return found


def scribble(peer: PeerSide, seed: int, rounds: int) -> int:
    """Write random words to all the shared memory that this end may write. How many places there were."""
    random_ = random.Random(seed)
    places = shared_with_others()
    memory = os.open("/proc/self/mem", os.O_RDWR)
    try:
        for _ in range(rounds):
            for first, size, name in places:
                # Not the first line of a control page: nobody reads it once they have met.
                offset = random_.randrange(128, min(size, 4096 if "control" in name else 1 << 20), 8)
                word = random_.choice([0, 8, 1 << 12, 1 << 18, (1 << 64) - 8, random_.getrandbits(64)])
                with contextlib.suppress(OSError):      # unmapped meanwhile: this end let go of its peer
                    os.pwrite(memory, word.to_bytes(8, "little"), first + offset)
    finally:
        os.close(memory)
    return len(places)


def write_word(peer: PeerSide, offset: int, word: int) -> None:
    """Write this word to every control page, at this place."""
    memory = os.open("/proc/self/mem", os.O_RDWR)
    try:
        for first, _, name in shared_with_others():
            if "control" in name:
                os.pwrite(memory, word.to_bytes(8, "little"), first + offset)
    finally:
        os.close(memory)


def take_until_an_error(peer: PeerSide) -> tuple[int, dict[str, Any]]:
    """How many messages came before an error, whatever they are, and that error."""
    count = 0
    while True:
        try:
            peer.channel.recv()
            count += 1
        except anywire.AnywireError as error:
            return count, describe(error)
