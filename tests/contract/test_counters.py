"""The counters page: layout, reuse, overflow, fork, and reading it from outside while the owner cannot help."""

from __future__ import annotations

import mmap
import os
import re
import resource
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from anywire.contract import counters, counters_page
from anywire.contract.counters import NoCounters, OwnSlot, open_page, page_fd, snapshot

DOCUMENT = Path(__file__).parents[2] / "docs" / "design" / "counters.md"

# A process that counts and then only waits for its input to end.
OWNER = """
import sys
from anywire.contract.counters import OwnSlot
slot = OwnSlot(3, "tcp://127.0.0.1:9000")
slot.add("messages_sent", 41)
slot.add("messages_sent")
slot.add("bytes_sent", 1 << 40)
slot.lost("connection reset by peer", 104)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def owner():
    process = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def run_in_child(check):
    """Run `check` in a forked child; its failure is the test's."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            check()
            status = 0
        except BaseException:  # noqa: BLE001 - nothing may leave the child but its status
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def documented(heading):
    section = DOCUMENT.read_text(encoding="utf-8").split(f"## {heading}", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| `(\w+)`", section, re.MULTILINE)
    return {name: (int(offset), int(size)) for offset, size, name in rows}


@pytest.mark.parametrize(("heading", "part"), [("Header", "header"), ("Slot", "slot")])
def test_the_layout_is_the_documented_one(heading, part):
    fields = documented(heading)
    compiled = counters.layout()
    assert {name: offset for name, (offset, _) in fields.items()} == compiled[part]
    ends = [offset + size for offset, size in fields.values()]
    assert [offset for offset, _ in fields.values()] == [0, *ends[:-1]]  # no gaps, no overlaps
    if part == "slot":
        assert ends[-1] == compiled["slot_size"] == counters_page.SLOT.size == 256
        assert list(fields)[5:21] == list(counters_page.COUNTERS)
    else:
        assert ends[-1] == counters_page.HEADER.size
    for number, name in counters_page.KINDS.items():
        assert f"{number} {name}" in DOCUMENT.read_text(encoding="utf-8")


def test_the_documented_numbers_are_in_the_page():
    slot = OwnSlot(counters_page.LISTENER, "unix:@layout")
    for number, name in enumerate(counters_page.COUNTERS):
        slot.add(name, 1000 + number)
    slot.lost("why", 104)
    retries = snapshot().connect_retries
    counters.count_connect_retry()
    index = next(stats.index for stats in snapshot().slots if stats.address == "unix:@layout")
    layout = counters.layout()
    with mmap.mmap(page_fd(), 0, prot=mmap.PROT_READ) as page:
        header = documented("Header")
        assert page[:8] == b"anywctr\0"
        for name, value in {
            "version": 1,
            "header_size": 4096,
            "slot_size": 256,
            "slot_count": 65536,
            "clock": 1,
            "reserved": 0,
            "connect_retries": retries + 1,
        }.items():
            offset, size = header[name]
            assert int.from_bytes(page[offset : offset + size], sys.byteorder) == value == layout.get(name, value)
        offset, size = header["pid"]
        assert int.from_bytes(page[offset : offset + size], sys.byteorder) == os.getpid()
        base = 4096 + 256 * index
        fields = documented("Slot")
        for number, name in enumerate(counters_page.COUNTERS):
            offset, size = fields[name]
            expected = 1000 + number + (name == "losses")
            assert int.from_bytes(page[base + offset : base + offset + size], sys.byteorder) == expected
        assert page[base + 160 : base + 192] == b"why".ljust(32, b"\0")
        assert page[base + 192 : base + 256] == b"unix:@layout".ljust(64, b"\0")


def test_stats_of_a_slot():
    slot = OwnSlot(counters_page.CHANNEL, "tcp://h:1")
    slot.add("bytes_received", 7)
    slot.lost("x" * 100, 5)
    stats = slot.stats()
    assert (stats.kind, stats.address, stats.bytes_received, stats.messages_sent) == ("channel", "tcp://h:1", 7, 0)
    assert (stats.losses, stats.loss, stats.loss_code) == (1, "x" * 32, 5)
    slot.set_label("a" * 100)
    assert slot.stats().address == "a" * 64
    slot.set_label("b")
    assert slot.stats().address == "b"
    slot.release()
    slot.release()
    assert slot.stats() == counters.Stats()
    slot.add("bytes_received")  # no crash, no effect
    with pytest.raises(ValueError, match="tuple.index"):
        slot.add("nonsense")


def test_released_slots_stay_in_the_sums():
    before = snapshot()
    slot = OwnSlot(counters_page.CHANNEL, "tcp://h:1")
    slot.add("messages_sent", 5)
    slot.add("queue_high", 10**6)
    slot.add("queue_depth", 3)
    slot.lost("gone", 32)
    during = snapshot()
    slot.release()
    after = snapshot()
    assert during.sum("messages_sent") == after.sum("messages_sent") == before.sum("messages_sent") + 5
    assert after.totals.messages_sent == before.totals.messages_sent + 5
    assert after.totals.queue_high == 10**6 == after.sum("queue_high")
    assert after.totals.queue_depth == before.totals.queue_depth
    assert (after.totals.loss, after.totals.loss_code) == ("gone", 32)
    assert (after.claims, after.releases) == (before.claims + 1, before.releases + 1)


def test_a_forked_child_counts_its_own_retries():
    counters.count_connect_retry()
    before = snapshot().connect_retries

    def check():
        assert snapshot().connect_retries == 0
        counters.count_connect_retry()
        assert snapshot().connect_retries == 1

    run_in_child(check)
    assert snapshot().connect_retries == before


def test_ten_thousand_cycles_do_not_grow_the_page():
    first = OwnSlot(counters_page.CHANNEL, "first")
    first.release()
    blocks = os.fstat(page_fd()).st_blocks
    descriptors = len(os.listdir("/proc/self/fd"))
    generations = set()
    for number in range(10_000):
        slot = OwnSlot(counters_page.CHANNEL, f"tcp://h:{number}")
        slot.add("messages_sent")
        generations.add(slot.stats().generation)
        slot.release()
    assert len(generations) == 10_000  # the same slot each time, and each owner told apart
    assert os.fstat(page_fd()).st_blocks == blocks
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_new_owner_starts_at_zero():
    slot = OwnSlot(counters_page.STREAM, "old")
    slot.add("drops", 9)
    slot.lost("old")
    del slot  # collected: released
    new = OwnSlot(counters_page.CHANNEL, "").stats()
    assert (new.drops, new.losses, new.loss, new.address, new.kind) == (0, 0, "", "", "channel")


def test_a_full_page_overflows_into_one_shared_slot():
    def check():
        held = [OwnSlot(counters_page.CHANNEL, "held") for _ in range(65_534)]
        assert snapshot().overflows == 0
        late = [OwnSlot(counters_page.CHANNEL, "late") for _ in range(2)]
        for slot in late:
            slot.add("messages_sent", 2)
            slot.set_label("must not rename the overflow slot")
        page = snapshot()
        assert page.overflows == 2
        assert (page.overflow.messages_sent, page.overflow.kind, page.overflow.address) == (4, "overflow", "")
        late.clear()
        del slot
        assert snapshot().overflow.messages_sent == 4
        held.clear()
        assert OwnSlot(counters_page.CHANNEL, "again").stats().kind == "channel"
        page = snapshot()
        assert page.claims == page.releases

    run_in_child(check)


def test_a_stopped_process_can_be_read_and_a_dead_one_too(owner):
    os.kill(owner.pid, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(owner.pid, os.WUNTRACED)[1])
    page = snapshot(owner.pid)
    assert page.pid == owner.pid
    (slot,) = page.slots
    assert (slot.kind, slot.address) == ("channel", "tcp://127.0.0.1:9000")
    assert (slot.messages_sent, slot.bytes_sent) == (42, 1 << 40)
    assert (slot.losses, slot.loss, slot.loss_code) == (1, "connection reset by peer", 104)
    assert page.started_monotonic_ns <= slot.opened_ns
    with open_page(owner.pid) as reader:
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        assert reader.read() == page
    with pytest.raises(NoCounters, match="there is no process"):
        snapshot(owner.pid)


def test_a_process_without_a_page_says_so():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        with pytest.raises(LookupError, match="no counters page|there is no process"):
            snapshot(process.pid)
        process.kill()


def test_own_page_from_inside_and_outside_is_the_same():
    slot = OwnSlot(counters_page.CHANNEL, "tcp://same:1")
    slot.add("messages_received", 3)
    assert snapshot() == snapshot(os.getpid())
    assert slot.stats() in snapshot().slots


def test_a_forked_child_counts_for_itself():
    slot = OwnSlot(counters_page.CHANNEL, "parent")
    slot.add("messages_sent")
    before = snapshot()
    inherited_fd = page_fd()

    def check():
        # The inherited slot is still memory, but nobody's; the parent's page is closed here.
        slot.add("messages_sent", 100)
        assert slot.stats().messages_sent == 100
        links = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path)]
        assert not any(counters_page.NAME in link for link in links)
        own = OwnSlot(counters_page.CHANNEL, "child")
        own.add("drops", 7)
        page = snapshot()
        assert page.pid == os.getpid()
        assert [stats.address for stats in page.slots] == ["child"]
        assert snapshot(os.getpid()) == page
        slot.release()  # must not enter the child's free list
        assert snapshot().releases == 0
        assert snapshot().totals.messages_sent == 0

        def grandchild():
            own.add("drops")
            assert snapshot().slots == ()

        run_in_child(grandchild)
        assert own.stats().drops == 7

    run_in_child(check)
    assert snapshot() == before
    assert page_fd() == inherited_fd


def test_a_fork_does_not_close_a_foreign_descriptor_under_the_page_number():
    def check():
        fd = page_fd()
        with open("/dev/null", "rb") as null:
            os.dup2(null.fileno(), fd)  # as closefrom() and an open() after it would do

        def grandchild():
            assert os.fstat(fd).st_rdev == os.stat("/dev/null").st_rdev
            assert page_fd() not in (fd, -1)

        run_in_child(grandchild)

    run_in_child(check)


def test_without_descriptors_counting_still_works():
    def check():
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limit[1]))
        slot = OwnSlot(counters_page.CHANNEL, "no descriptor")
        slot.add("accepts", 4)
        assert snapshot().slots[0].accepts == 4
        assert page_fd() == -1
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        with pytest.raises(NoCounters):
            snapshot(os.getpid())
        run_in_child(lambda: snapshot())
        assert slot.stats().accepts == 4

    run_in_child(check)


def test_the_page_does_not_take_the_numbers_of_standard_files():
    def check():
        os.close(0)
        assert page_fd() > 2

    run_in_child(check)


def _fake_page(pid, *, seal, version=1, header_size=4096, slot_size=256, used=2, size=8192):
    """A memfd named as the page, as a hostile or newer process of this user might hold it."""
    import fcntl

    fd = os.memfd_create(counters_page.NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    header = counters_page.HEADER.pack(
        counters_page.MAGIC, version, header_size, slot_size, 65536, pid, used, 0, 0, 0, 0, 0, 1, 0, 0
    )
    os.pwrite(fd, header, 0)
    if seal:
        fcntl.fcntl(fd, 1033, 2)  # F_ADD_SEALS, F_SEAL_SHRINK
    return fd


@pytest.mark.parametrize(
    ("fake", "says"),
    [
        ({"seal": False}, "not sealed"),
        ({"seal": True, "version": 2}, "version 2"),
        ({"seal": True, "slot_size": 8}, "impossible sizes"),
        ({"seal": True, "header_size": 1}, "impossible sizes"),
        ({"seal": True, "used": 0}, "not set up"),
        ({"seal": True, "header_size": 1 << 31}, "not set up"),
        ({"seal": True, "pid": 1 << 30}, "no counters page"),
        ({"seal": True, "size": 16}, "not set up"),
    ],
)
def test_a_page_that_cannot_be_trusted_is_refused(fake, says):
    def check():
        pid = fake.get("pid", os.getpid())
        _fake_page(pid, **{key: value for key, value in fake.items() if key != "pid"})
        with pytest.raises(NoCounters, match=says):
            snapshot(os.getpid())

    run_in_child(check)


def test_a_used_count_beyond_the_file_is_cut():
    def check():
        _fake_page(os.getpid(), seal=True, used=4_000_000_000)
        assert snapshot(os.getpid()).slots == ()

    run_in_child(check)
