"""The layout drawn in docs/design/shared-memory.md is the compiler's, the library's, and the plain Python peer's."""

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import shm_peer as raw

from anywire.framing.preamble import Preamble, decode
from anywire.wires import _shm_memory, shm

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "design" / "shared-memory.md").read_text(encoding="utf-8")
FIELDS = {
    name: (int(offset), int(size))
    for offset, size, name in re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \|", PAGE, re.MULTILINE)
}

BROADCAST = ("start", "dropped", "floor", "oldest", "first", "over", "lost", "pinned", "pins")
"""What an ordinary connection does not use."""

PROGRAM = """
#include <stdio.h>
#include "anywire/ipc/ring.h"
int main(void) {{
    {prints}
    printf("%zu %zu\\n", sizeof(aw_control) <= 4096 ? (size_t)4096 : sizeof(aw_control), (size_t)AW_RETURNS);
    printf("%llx %u\\n", (unsigned long long)AW_RING_MAGIC, AW_RING_VERSION);
    return 0;
}}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_offsets_drawn_are_the_compilers(tmp_path):
    assert len(FIELDS) == 22
    prints = "\n".join(
        f'printf("{name} %zu %zu\\n", offsetof(aw_control, {name}), sizeof(((aw_control *)0)->{name}));'
        for name in FIELDS
    )
    (tmp_path / "layout.c").write_text(PROGRAM.format(prints=prints))
    subprocess.run(
        ["cc", "-std=c11", "-I", str(ROOT / "src"), "-o", "layout", "layout.c"], cwd=tmp_path, check=True, timeout=50
    )
    lines = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout.splitlines()
    got = {name: (int(offset), int(size)) for name, offset, size in (line.split() for line in lines[:-2])}
    assert got == FIELDS
    assert lines[-2].split() == ["4096", str(raw.MOST_RETURNS)]
    assert int(lines[-1].split()[0], 16) == raw.RING_MAGIC == int.from_bytes(b"aywring1", "little")
    assert int(lines[-1].split()[1]) == raw.VERSION == _shm_memory.VERSION


def test_the_plain_python_peer_has_the_same():
    there = {
        "magic": raw.MAGIC_AT, "version": raw.VERSION_AT, "nonce": raw.NONCE_AT, "echo": raw.ECHO_AT, "head": raw.HEAD,
        "tail": raw.TAIL, "taken": raw.TAKEN, "returned": raw.RETURNED, "data_wanted": raw.DATA_WANTED,
        "closed": raw.CLOSED, "room_wanted": raw.ROOM_WANTED, "returns": raw.RETURNS,
    }  # fmt: skip
    assert there == {name: offset for name, (offset, _) in FIELDS.items() if name not in ("flags", *BROADCAST)}


def test_the_preamble_shown_is_ours():
    shown = re.search(r"```hex preamble\n(.*?)```", PAGE, re.DOTALL)
    assert shown is not None
    data = bytes.fromhex(shown[1])
    hello = struct.pack("<IIQQQ", 1, 0, 1 << 18, 64 << 20, 0x1122334455667788)
    assert data == Preamble(16 << 20, extensions={shm.MEMORY: hello + b"\x03"}).encode()
    assert decode(data).extensions == {2: hello + b"\x03"}


def test_the_memories_carry_what_is_said():
    ours = _shm_memory.Outgoing(1 << 16, 1 << 20)
    inc = _shm_memory.Incoming(ours.data_fd, ours.control_fd, 1 << 16, 1 << 20, ours.nonce)
    assert ours.proven() and inc.views == 0
