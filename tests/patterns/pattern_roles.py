"""What peers of the pattern tests can be asked to do: each runs in the peer, on the blocking front."""

from __future__ import annotations

import resource
import time
from typing import Any

from conformance.peer import PeerSide
from conformance.roles import describe, message, number_of

import anywire
import anywire.sync
from anywire.patterns.controls import SUBSCRIBE  # noqa: F401  (for the tests)

# -- publish and subscribe ---


def subscribe(peer: PeerSide, address: str, **options: Any) -> None:
    peer.channel = anywire.sync.subscribe(address, **options)


def publish(peer: PeerSide, address: str, **options: Any) -> list[str]:
    peer.listener = anywire.sync.publish(address, **options).start()
    return [str(address) for address in peer.listener.addresses]


def take_numbers(peer: PeerSide, count: int | None = None, pause: float = 0.0) -> list[int]:
    """The numbers of the next messages: so many, or all up to the end."""
    numbers: list[int] = []
    while count is None or len(numbers) < count:
        try:
            numbers.append(number_of(peer.channel.recv()))
        except anywire.EndOfChannel:
            break
        if pause:
            time.sleep(pause)
    return numbers


def take_runs(peer: PeerSide) -> tuple[list[int], list[tuple[int, int]], dict[str, Any]]:
    """All numbers up to an error, (how many numbers before it, lost) of each gap that was told, and that error."""
    numbers: list[int] = []
    gaps: list[tuple[int, int]] = []
    while True:
        try:
            numbers.append(number_of(peer.channel.recv()))
        except anywire.MessagesLost as error:
            gaps.append((len(numbers), error.lost))
        except anywire.AnywireError as error:
            return numbers, gaps, {**describe(error), "counted": peer.channel.lost}


def take_batches(peer: PeerSide, limit: int = 50) -> list[int]:
    numbers: list[int] = []
    while True:
        try:
            batch = peer.channel.recv_many(limit)
        except anywire.EndOfChannel:
            return numbers
        assert 1 <= len(batch) <= limit
        numbers.extend(map(number_of, batch))


def publish_numbers(peer: PeerSide, first: int, count: int, size: int = 8) -> None:
    for number in range(first, first + count):
        peer.listener.send(message(number, size))


def publish_many(peer: PeerSide, first: int, count: int, size: int = 8) -> None:
    peer.listener.send_many(message(number, size) for number in range(first, first + count))


def wait_for_subscribers(peer: PeerSide, count: int) -> None:
    while len(peer.listener.subscribers) != count:
        time.sleep(0.002)


def end(peer: PeerSide) -> None:
    for thing in (peer.channel, peer.listener):
        if thing is not None:
            thing.close()


def leave(peer: PeerSide) -> None:
    peer.channel.close()


def switches(peer: PeerSide, seconds: float) -> int:
    """How often this process went to sleep by itself in so many seconds, besides this one sleep."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    time.sleep(seconds)
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before - 1


# -- push and pull ---


def pull(peer: PeerSide, *addresses: str, **options: Any) -> list[str]:
    peer.channel = anywire.sync.pull(*addresses, **options).start()
    return [str(address) for address in peer.channel.addresses]


def push(peer: PeerSide, *addresses: str, **options: Any) -> list[str]:
    peer.listener = anywire.sync.push(*addresses, **options).start()
    return [str(address) for address in peer.listener.addresses]


def until_received(peer: PeerSide, count: int) -> None:
    """When so many messages have come, whoever took them."""
    while peer.channel.stats().received < count:
        time.sleep(0.002)


def take_and_report(peer: PeerSide) -> None:
    """Report each number before the next one is taken, so that the test knows what was handed over before a kill."""
    for data in peer.channel:
        peer.report(number_of(data))


def push_numbers(peer: PeerSide, numbers: list[int], size: int = 8) -> None:
    for number in numbers:
        peer.listener.send(message(number, size))


def push_error(peer: PeerSide, number: int) -> dict[str, Any]:
    try:
        while True:
            peer.listener.send(message(number))
    except anywire.AnywireError as error:
        return describe(error)


def push_stats(peer: PeerSide) -> dict[str, int]:
    """Its counts, when all is confirmed."""
    while peer.listener.unconfirmed:
        time.sleep(0.002)
    return {name: getattr(peer.listener.stats(), name) for name in ("sent", "confirmed", "lost", "unconfirmed")}
