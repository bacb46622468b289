"""`anywire ipc`: real objects of every kind, made by a C program, listed, removed and watched.

In an IPC and a mount namespace of their own, so that nothing of this machine's is seen or removed.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli_processes import ANYWIRE, PATIENCE, started

# Each test starts the command several times, and each start looks at every process of the machine.
pytestmark = pytest.mark.timeout(180)

MAKER = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <mqueue.h>
#include <semaphore.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>
#define NEED(x) if (!(x)) { perror(#x); return 1; }
int main(int argc, char** argv) {                       /* the FIFO, the socket's name */
    struct mq_attr attr = { .mq_maxmsg = 4, .mq_msgsize = 100 };
    mqd_t queue = mq_open("/aw_queue", O_CREAT | O_EXCL | O_RDWR, 0600, &attr);
    NEED(queue >= 0 && mq_send(queue, "hello", 5, 0) == 0 && mq_send(queue, "you", 3, 0) == 0);
    sem_t* sem = sem_open("/aw_same", O_CREAT | O_EXCL, 0640, 3);
    NEED(sem != SEM_FAILED);
    int shm = shm_open("/aw_same", O_CREAT | O_EXCL | O_RDWR, 0600);
    NEED(shm >= 0 && ftruncate(shm, 5000) == 0);
    char* memory = mmap(NULL, 5000, PROT_READ | PROT_WRITE, MAP_SHARED, shm, 0);
    NEED(memory != MAP_FAILED && close(shm) == 0);      /* mapped, and not open */
    memory[0] = 1;
    int queues = msgget(0x5eed, IPC_CREAT | IPC_EXCL | 0600);
    struct { long type; char text[7]; } message = { 1, "seven b" };
    NEED(queues >= 0 && msgsnd(queues, &message, 7, 0) == 0);
    int set = semget(IPC_PRIVATE, 5, 0640);
    int segment = shmget(0x5eed, 6000, IPC_CREAT | IPC_EXCL | 0600);
    NEED(set >= 0 && segment >= 0 && shmat(segment, NULL, 0) != (void*) -1);
    NEED(mkfifo(argv[1], 0600) == 0 && open(argv[1], O_RDWR) >= 0);
    struct sockaddr_un name = { .sun_family = AF_UNIX };
    strcpy(name.sun_path + 1, argv[2]);
    socklen_t length = offsetof(struct sockaddr_un, sun_path) + 1 + strlen(argv[2]);
    int server = socket(AF_UNIX, SOCK_STREAM, 0), client = socket(AF_UNIX, SOCK_STREAM, 0);
    NEED(bind(server, (struct sockaddr*) &name, length) == 0 && listen(server, 5) == 0);
    NEED(connect(client, (struct sockaddr*) &name, length) == 0 && accept(server, NULL, NULL) >= 0);
    printf("%d %d %d\n", queues, set, segment);
    fflush(stdout);
    return read(0, argv[1], 1) < 0;
}
"""


class World:
    """The namespaces, and the program that made one of everything there."""

    def __init__(self, inside: list[str], directory: Path, maker: subprocess.Popen[str], numbers: list[str]) -> None:
        self.inside = inside
        self.directory = directory
        self.maker = maker
        self.queue, self.set, self.segment = (
            f"{kind}:{number}" for kind, number in zip(("msg", "sem", "shm"), numbers, strict=True)
        )

    def run(self, *arguments: str, stdin: str = "", status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.inside, *ANYWIRE, "ipc", *arguments], input=stdin, capture_output=True, timeout=PATIENCE,
            check=False, text=True,
        )
        assert done.returncode == status, done.stderr
        return done

    def ls(self, *arguments: str) -> dict[tuple[str, str], dict[str, Any]]:
        told = json.loads(self.run("ls", "--json", *arguments).stdout)
        return {(thing["kind"], thing["name"]): thing for thing in told["objects"]}

    def mount(self) -> None:
        place = self.directory / "mqueue"
        place.mkdir()
        subprocess.run([*self.inside, "mount", "-t", "mqueue", "none", place], check=True, timeout=PATIENCE)

    def leave(self) -> None:
        """Its objects stay."""
        self.maker.kill()
        self.maker.wait()


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("maker")
    (directory / "maker.c").write_text(MAKER)
    command = ["gcc", "-Wall", "-Werror", "-o", directory / "maker", directory / "maker.c", "-pthread", "-lrt"]
    subprocess.run(command, check=True, timeout=60)
    return directory / "maker"


@pytest.fixture
def world(maker: Path, tmp_path: Path) -> Iterator[World]:
    user = [] if os.getuid() == 0 else ["--map-root-user"]
    holder = subprocess.Popen(
        ["unshare", "--ipc", "--mount", *user, "sh", "-c", "mount -t tmpfs none /dev/shm && echo ready && exec cat"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )
    with holder:
        assert holder.stdin is not None and holder.stdout is not None
        if holder.stdout.readline() != "ready\n":
            holder.stdin.close()
            pytest.skip("namespaces of one's own are not allowed here")
        also = ["--user", "--preserve-credentials"] if user else []
        inside = ["nsenter", f"--target={holder.pid}", "--ipc", "--mount", f"--wd={os.getcwd()}", *also]
        made = subprocess.Popen(
            [*inside, maker, tmp_path / "fifo", f"aw-{os.getpid()}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        with made:
            assert made.stdout is not None
            try:
                yield World(inside, tmp_path, made, made.stdout.readline().split())
            finally:
                made.kill()
                holder.kill()


@contextmanager
def running(command: list[str], **more: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that is killed at the end of the block if it still runs."""
    with subprocess.Popen(command, text=True, **more) as process:
        try:
            yield process
        finally:
            process.kill()


def test_everything_is_listed_with_who_uses_it(world: World) -> None:
    found = world.ls("-d", str(world.directory))
    socket = ("abstract", f"@aw-{os.getpid()}")
    mine = {key: thing for key, thing in found.items() if key[0] != "abstract" or key == socket}
    by = [{"pid": world.maker.pid, "name": "maker"}]

    def thing(kind: str, name: str) -> dict[str, Any]:
        it = mine.pop((kind, name))
        assert it["owner"] == "root"
        return {key: value for key, value in it.items() if key not in ("kind", "name", "owner", "details")}

    assert thing("mq", "/aw_queue") == {"mode": "0600", "size": None, "depth": 8, "used": True, "processes": by}
    assert thing("sem", "/aw_same") == {"mode": "0640", "size": 32, "depth": 3, "used": True, "processes": by}
    assert thing("shm", "/aw_same") == {"mode": "0600", "size": 5000, "depth": None, "used": True, "processes": by}
    assert thing("sysv-mq", world.queue) == {"mode": "0600", "size": 7, "depth": 1, "used": None, "processes": []}
    assert thing("sysv-sem", world.set) == {"mode": "0640", "size": 5, "depth": None, "used": None, "processes": []}
    assert thing("sysv-shm", world.segment) == {
        "mode": "0600", "size": 6000, "depth": None, "used": True, "processes": by,
    }
    assert thing("fifo", str(world.directory / "fifo")) == {
        "mode": "0600", "size": None, "depth": None, "used": True, "processes": by,
    }
    assert thing(*socket) == {"mode": "", "size": None, "depth": 1, "used": True, "processes": by}
    assert mine == {}


def test_the_table_is_a_line_each_and_a_missing_mount_is_told(world: World) -> None:
    done = world.run("ls", "--kind", "mq,sem,sysv-shm")
    header, *lines = done.stdout.splitlines()
    assert header.split() == "KIND NAME OWNER MODE SIZE DEPTH USED PROCESSES DETAILS".split()
    maker = f"{world.maker.pid} maker"
    assert [" ".join(line.split()) for line in lines] == [
        f"mq /aw_queue root 0600 8 yes {maker} bytes waiting",
        f"sem /aw_same root 0640 32 3 yes {maker} value, 0 waiting",
        f"sysv-shm {world.segment} root 0600 6000 yes {maker} key 0x00005eed, attached 1 times, made by "
        f"{world.maker.pid}",
    ]
    assert "mount -t mqueue none /dev/mqueue (as root)" in done.stderr
    world.mount()
    done = world.run("ls", "--kind", "mq")
    assert "/aw_queue" in done.stdout and done.stderr == ""


def test_what_nobody_has_open_any_more_is_told(world: World) -> None:
    world.leave()
    found = world.ls("-d", str(world.directory), "--kind", "mq,sem,shm,sysv-shm,fifo")
    assert ("mq", "/aw_queue") not in found                 # nobody has it open, and its file system is not mounted
    assert {thing["used"] for thing in found.values()} == {False} and len(found) == 4
    world.mount()
    assert world.ls("--kind", "mq")["mq", "/aw_queue"]["depth"] == 8


def test_rm_asks_and_removes_each_kind(world: World) -> None:
    world.mount()
    done = world.run("rm", "/aw_queue", stdin="", status=1)     # no answer is none
    assert "Remove it, 1 in use? [y/N]" in done.stdout
    assert "removed mq /aw_queue" in world.run("rm", "/aw_queue", stdin="y\n").stdout
    assert "(sem, shm); say which with --kind" in world.run("rm", "/aw_same", status=2).stderr
    world.run("rm", "--kind", "sem", "/aw_same", "--yes")
    assert {"/aw_same"} == {name for kind, name in world.ls() if kind in ("mq", "sem", "shm")}
    fifo = str(world.directory / "fifo")
    done = world.run("rm", "--yes", "/aw_same", world.queue, world.set, world.segment, fifo)
    assert done.stdout.count("removed") == 5
    left = world.ls("-d", str(world.directory))
    assert [thing["details"] for (kind, _), thing in left.items() if kind != "abstract"] == [
        f"private, attached 1 times, made by {world.maker.pid}, removed, goes with its last user",
    ]
    done = world.run("rm", "--yes", f"@aw-{os.getpid()}", status=1)
    assert "goes with its socket" in done.stderr
    assert "there is no '/aw_queue'" in world.run("rm", "/aw_queue", status=2).stderr
    assert "one of them" in world.run("rm", "x", "--orphans", status=2).stderr


def test_orphans_are_what_nobody_uses(world: World) -> None:
    assert world.run("rm", "--orphans").stdout == "Nothing to remove.\n"
    world.leave()
    world.mount()
    done = world.run("rm", "--orphans", stdin="y\n")
    assert "Remove these 3? [y/N]" in done.stdout
    # Messages and counts may still be of use to somebody: these go when they are named, or asked for by --kind.
    assert {kind for kind, _ in world.ls("-d", str(world.directory)) if kind != "abstract"} == {
        "mq", "sysv-mq", "sysv-sem", "fifo",
    }
    world.run("rm", "--orphans", "--kind", "mq,fifo", "-d", str(world.directory), "--yes")
    assert {kind for kind, _ in world.ls("-d", str(world.directory)) if kind != "abstract"} == {"sysv-mq", "sysv-sem"}


def test_what_changes_while_the_question_waits_stays(world: World) -> None:
    world.leave()
    command = [*world.inside, *ANYWIRE, "ipc", "rm", "--orphans", "--kind", "shm"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with running(command, **pipes) as asking:
        assert asking.stdout is not None
        asking.stdout.readline()                            # the table: it has looked
        use = [*world.inside, sys.executable, "-c", "f = open('/dev/shm/aw_same'); print(flush=True); input()"]
        with running(use, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
            assert user.stdout is not None
            user.stdout.readline()
            _, errors = asking.communicate("y\n", timeout=PATIENCE)
    assert "/aw_same: has changed meanwhile, and stays" in errors
    assert asking.returncode == 1
    assert ("shm", "/aw_same") in world.ls("--kind", "shm")


def test_watch_tells_what_comes_changes_and_goes(world: World) -> None:
    command = [*world.inside, *ANYWIRE, "ipc", "watch", "--kind", "sem,shm", "--every", "0.05"]
    with running(command, stdout=subprocess.PIPE) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline().startswith("= sem /aw_same  owner root  mode 0640  size 32  depth 3  used")
        assert watching.stdout.readline().startswith("= shm /aw_same")
        script = "set -e; cd /dev/shm; printf 12345 > aw_new"
        subprocess.run([*world.inside, "sh", "-c", script], check=True, timeout=PATIENCE)
        line = watching.stdout.readline()
        assert line.startswith("+ shm /aw_new")
        world.leave()
        told: set[str] = set()
        while not told >= {"~ sem /aw_same", "~ shm /aw_same"}:
            told.add(watching.stdout.readline().partition("  ")[0])
        assert told <= {"~ sem /aw_same", "~ shm /aw_same", "~ shm /aw_new"}
        world.run("rm", "--yes", "--kind", "sem", "/aw_same")
        assert watching.stdout.readline().startswith("- sem /aw_same")
        watching.send_signal(signal.SIGINT)
        assert watching.wait(PATIENCE) == -signal.SIGINT


def test_watch_draws_a_table_on_a_terminal(world: World) -> None:
    ours, theirs = pty.openpty()
    command = [*world.inside, *ANYWIRE, "ipc", "watch", "--kind", "sem", "--every", "0.05"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "150", "LINES": "20"}
    with running(command, stdout=theirs, stderr=theirs, env=environment) as watching:
        os.close(theirs)
        drawn = b""
        while drawn.count(b"/aw_same") < 2:                 # drawn again and again
            drawn += os.read(ours, 65536)
        watching.send_signal(signal.SIGINT)
        assert watching.wait(PATIENCE) == -signal.SIGINT
    os.close(ours)
    assert b"KIND" in drawn and b"Traceback" not in drawn


def test_other_users_processes_are_not_known(world: World) -> None:
    if os.getuid():
        pytest.skip("only root can be somebody else")
    drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    command = [*world.inside, *drop, *ANYWIRE, "ipc", "ls", "--json", "--kind", "sem,shm,sysv-shm"]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE).stdout)
    assert "processes of other users can't be looked at" in told["notes"][-1]
    by_kind = {thing["kind"]: thing for thing in told["objects"]}
    assert by_kind["sem"]["depth"] is None and "may not be read" in by_kind["sem"]["details"]
    assert by_kind["shm"]["used"] is None
    assert by_kind["sysv-shm"]["used"] is True              # the kernel counts


def test_completion_knows_what_there_is(world: World) -> None:
    words = "anywire ipc rm /aw_"
    environment = {**os.environ, "_ANYWIRE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "3"}
    command = [*world.inside, *ANYWIRE]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=PATIENCE, check=False, text=True)
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == {"/aw_queue", "/aw_same"}


@pytest.mark.parametrize("command", ["ls", "rm", "watch"])
def test_help_has_examples(command: str) -> None:
    with started("ipc", command, "--help") as process:
        text = process.communicate(timeout=PATIENCE)[0].decode()
    assert text.partition("Examples:\n")[2].count(f"anywire ipc {command}") >= 2
    assert max(map(len, text.splitlines())) <= 100
