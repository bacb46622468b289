"""`anywire cat` as people use netcat and socat: real processes, pipes, files, signals and foreign peers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from cli_processes import ANYWIRE, PATIENCE, finish, listening, run, started, wait_with_memory

from anywire import sync
from anywire.cli.certificates import NoAuthority
from anywire.cli.certificates import make as make_certificates
from anywire.contract.address import Address
from anywire.contract.errors import EndOfChannel, PeerLost, TimedOut
from anywire.contract.wire import wire_for
from anywire.ipc import MessageQueue, sysv

WIRES = [
    "tcp://127.0.0.1:0",
    "unix://{tmp}/s",
    "unix:@anywire-cat-test-{pid}",
    "unix://{tmp}/q?type=seqpacket",
    "shm://anywire-cat-test-{pid}",
]


@pytest.fixture(params=WIRES)
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.param).format(tmp=tmp_path, pid=os.getpid())


def tells_loss(address: str) -> bool:
    """Whether a loss is told from an end there, and what was taken is confirmed."""
    return wire_for(address).traits(Address.parse(address)).promises("clean_end")


def test_both_directions_binary_and_each_end_by_itself(address: str) -> None:
    question, answer = os.urandom(3_000_001), os.urandom(2_000_003)
    with listening(address) as (server, real):
        thread = threading.Thread(target=lambda: results.append(finish(server, answer)))
        results: list[tuple[bytes, bytes]] = []
        thread.start()
        client = run("cat", real, stdin=question)
        thread.join(PATIENCE)
        assert client.stderr == b""
        assert client.stdout == answer
        assert results[0][0] == question
        assert client.returncode == 0 == server.returncode


def test_certificates_are_options_of_the_address(tmp_path: Path) -> None:
    try:
        ca, cert, key = make_certificates(tmp_path)
    except NoAuthority as reason:
        pytest.skip(str(reason))
    with listening(f"tls://127.0.0.1:0?cert={cert}&key={key}", stdin=subprocess.DEVNULL) as (server, real):
        assert run("cat", real, stdin=b"x").returncode == 1                # nobody vouches for it
    with listening("-o", f"cert={cert}", "-o", f"key={key}", "tls://127.0.0.1:0") as (server, real):
        client = run("cat", "--send-only", "-o", f"ca={ca}", real, stdin=b"over tls")
        assert (client.returncode, client.stderr) == (0, b"")
        assert finish(server)[0] == b"over tls"


def test_datagrams_in_both_directions_end_by_silence() -> None:
    """udp has no end to tell: --linger is how long both listen after their input."""
    with listening("--linger", "1", "udp://127.0.0.1:0") as (server, real), started("cat", real) as client:
        assert client.stdin is not None and client.stdout is not None
        assert server.stdin is not None and server.stdout is not None
        client.stdin.write(b"question\n")
        client.stdin.flush()
        assert server.stdout.readline() == b"question\n"
        server.stdin.write(b"answer\n")
        server.stdin.flush()
        assert client.stdout.readline() == b"answer\n"
        assert finish(client) == (b"", b"")
        assert client.returncode == 0
        assert finish(server)[0] == b""
        assert server.returncode == 0


def test_a_fifo_is_one_way_and_its_name_goes_with_the_listener(tmp_path: Path) -> None:
    address = f"fifo://{tmp_path}/f"
    with listening(address, stdin=subprocess.DEVNULL) as (server, real):
        client = run("cat", "--wait", str(PATIENCE), real, stdin=b"one way\0")
        assert (client.returncode, client.stdout, client.stderr) == (0, b"", b"")
        assert finish(server, None)[0] == b"one way\0"
        assert server.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_fifo_with_replies_carries_both_directions(tmp_path: Path) -> None:
    question, answer = os.urandom(300_001), os.urandom(200_003)
    with listening(f"fifo://{tmp_path}/f?reply=true") as (server, real):
        results: list[tuple[bytes, bytes]] = []
        thread = threading.Thread(target=lambda: results.append(finish(server, answer)))
        thread.start()
        client = run("cat", real, stdin=question)
        thread.join(PATIENCE)
        assert (client.returncode, client.stderr) == (0, b"")
        assert client.stdout == answer
        assert results[0][0] == question
        assert server.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_many_writers_of_a_fifo_have_their_lines_whole(tmp_path: Path) -> None:
    with listening("--keep", "--lines", f"fifo://{tmp_path}/f", stdin=subprocess.DEVNULL) as (server, address):
        lines = [b"%d:%d:" % (number, line) + b"x" * 9000 for number in range(3) for line in range(50)]
        writers = []
        for number in range(3):
            mine = b"\n".join(line for line in lines if line.startswith(b"%d:" % number))
            writers.append(threading.Thread(target=run, args=("cat", "--lines", address), kwargs={"stdin": mine}))
            writers[-1].start()
        assert server.stdout is not None
        heard = [server.stdout.readline().removesuffix(b"\n") for _ in lines]
        for writer in writers:
            writer.join(PATIENCE)
        assert sorted(heard) == sorted(lines)
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE) == -signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def queue_name() -> Iterator[str]:
    name = f"/anywire-cat-test-{os.getpid()}"
    yield name
    for suffix in ("", ".reply"):
        with suppress(FileNotFoundError):
            MessageQueue.unlink(name + suffix)


def test_a_message_queue_is_one_way_and_ends_by_silence(queue_name: str) -> None:
    """Nothing tells of an end there: --linger is how long the listener waits for more. The queue goes with it."""
    data = os.urandom(50_001)                  # a pipe has room for it
    with listening("--linger", "1", f"mq://{queue_name}?depth=4&message_size=1000") as (server, real):
        client = run("cat", real, stdin=data)                       # in messages that fit
        assert (client.returncode, client.stdout, client.stderr) == (0, b"", b"")
        assert finish(server)[0] == data
        assert server.returncode == 0
    with pytest.raises(FileNotFoundError):
        MessageQueue.open(queue_name)


def test_a_message_queue_with_replies_carries_both_directions(queue_name: str) -> None:
    address = f"mq://{queue_name}?depth=4&reply=true"
    with listening("--linger", "1", address) as (server, real), started("cat", real) as client:
        assert client.stdin is not None and client.stdout is not None
        assert server.stdin is not None and server.stdout is not None
        for _ in range(3):
            client.stdin.write(b"question\n")
            client.stdin.flush()
            assert server.stdout.readline() == b"question\n"
            server.stdin.write(b"answer\n")
            server.stdin.flush()
            assert client.stdout.readline() == b"answer\n"
        assert finish(client) == (b"", b"")
        assert finish(server)[0] == b""
        assert (client.returncode, server.returncode) == (0, 0)


def test_lines_are_the_messages_of_a_queue(queue_name: str) -> None:
    """Whoever made it, whoever reads or writes it: no reader is needed to send."""
    with MessageQueue.create(queue_name, 8, 100) as queue:
        client = run("cat", "--lines", "-o", "priority=7", f"mq://{queue_name}", stdin=b"one\n\nthree\n")
        assert (client.returncode, client.stderr) == (0, b"")
        assert [queue.recv_with_priority(0) for _ in range(3)] == [(b"one", 7), (b"", 7), (b"three", 7)]
        long = run("cat", "--lines", f"mq://{queue_name}", stdin=b"x" * 101)
        assert long.returncode == 1 and long.stderr.count(b"\n") == 1 and b"message_size" in long.stderr
        queue.send(b"from elsewhere")
        with listening("--lines", "--linger", "0.2", f"mq://{queue_name}") as (server, _):
            assert finish(server)[0] == b"from elsewhere\n"
            assert server.returncode == 0


def test_lines_are_the_messages_of_a_system_v_queue() -> None:
    with sysv.MessageQueue.create(None, owner=True) as queue:
        address = f"sysv://{queue.key:#x}"
        client = run("cat", "--lines", "-o", "type=7", address, stdin=b"one\n\nthree\n")
        assert (client.returncode, client.stderr) == (0, b"")
        assert [queue.recv(block=False) for _ in range(3)] == [(b"one", 7), (b"", 7), (b"three", 7)]
        long = run("cat", "--lines", address, stdin=bytes(sysv.limits().msgmax + 1))
        assert long.returncode == 1 and long.stderr.count(b"\n") == 1 and b"sysctl -w kernel.msgmax=" in long.stderr
        queue.send(b"from elsewhere", 5)
        with listening("--lines", "--linger", "0.2", address) as (server, _):
            assert finish(server)[0] == b"from elsewhere\n"
            assert server.returncode == 0


@pytest.mark.parametrize("raw", [[], ["--raw"]], ids=["messages", "raw"])
def test_an_inherited_pipe_joins_two_of_them(raw: list[str]) -> None:
    reader, writer = os.pipe()
    try:
        with (
            started("cat", *raw, f"pipe:?read={reader}", stdin=subprocess.DEVNULL, pass_fds=[reader]) as taking,
            started("cat", *raw, f"pipe:?write={writer}", pass_fds=[writer]) as giving,
        ):
            os.close(writer)
            writer = -1
            assert finish(giving, b"through a pipe\0") == (b"", b"")
            assert finish(taking, None) == (b"through a pipe\0", b"")
            assert giving.returncode == 0 == taking.returncode
    finally:
        for fd in (reader, writer):
            if fd >= 0:
                os.close(fd)


def test_what_is_said_arrives_while_input_is_open(address: str) -> None:
    """`tail -f log | anywire cat ADDRESS`."""
    with listening(address) as (server, real), started("cat", real) as client:
        assert client.stdin is not None and server.stdout is not None
        for line in (b"first\n", b"second\n"):
            client.stdin.write(line)
            client.stdin.flush()
            assert server.stdout.readline() == line
        client.stdin.close()
        client.stdin = None
        assert finish(server)[1].endswith(b"anywire: sent 0 bytes, received 13 bytes\n")
        assert finish(client) == (b"", b"")
        assert client.returncode == 0 == server.returncode


@contextmanager
def serving(handler: Any, address: str = "tcp://127.0.0.1:0", **options: Any) -> Iterator[str]:
    """A handler of ours at the other end, in this process."""
    with sync.serve(handler, address, **options) as server:
        yield str(server.addresses[0])


def test_lines_are_messages_and_the_last_needs_no_newline() -> None:
    heard: list[bytes] = []

    def handle(channel: Any) -> None:
        heard.extend(channel)

    with serving(handle) as address:
        done = run("cat", "--lines", address, stdin=b"one\n\ntwo\r\nthree")
    assert done.returncode == 0, done.stderr
    assert heard == [b"one", b"", b"two\r", b"three"]


def test_messages_are_printed_as_lines_and_nul_separates_on_request() -> None:
    def handle(channel: Any) -> None:
        channel.send_many([b"a\nb", b"", b"c"])

    with serving(handle) as address:
        assert run("cat", "--lines", address).stdout == b"a\nb\n\nc\n"
        assert run("cat", "--null", address).stdout == b"a\nb\0\0c\0"
        assert run("cat", address).stdout == b"a\nbc"


def test_input_larger_than_memory_allows_leaves_memory_flat(tmp_path: Path) -> None:
    size = 600 << 20
    source = tmp_path / "sparse"
    with source.open("wb") as file:
        file.truncate(size)
    with (
        listening("tcp://127.0.0.1:0", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as (server, address),
        source.open("rb") as stdin,
        started("cat", address, stdin=stdin) as client,
    ):
        assert server.stdout is not None
        counted = 0
        while chunk := server.stdout.read(1 << 20):
            counted += len(chunk)
        assert counted == size
        for process in (client, server):
            status, most = wait_with_memory(process)
            assert status == 0
            assert most < 250 << 20, "a batch of messages, or two, but not the file"


def test_a_line_that_never_ends_is_refused_before_it_fills_the_memory() -> None:
    with serving(lambda channel: list(channel)) as address:
        done = run("cat", "--lines", "--max-message", "1MiB", address, stdin=b"x" * (5 << 20))
    assert done.returncode == 1
    assert b"over the limit of 1,048,576" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_raw_speaks_to_a_plain_socket_server() -> None:
    """What `nc -l` or socat would be."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def peer() -> None:
            connection = listener.accept()[0]
            with connection, connection.makefile("rb") as reader:
                heard.append(reader.read())                 # up to the half-close
                connection.sendall(b"answer\0\xff")

        heard: list[bytes] = []
        thread = threading.Thread(target=peer)
        thread.start()
        done = run("cat", "--raw", f"tcp://127.0.0.1:{listener.getsockname()[1]}", stdin=b"question\n\0")
        thread.join(PATIENCE)
    assert done.returncode == 0, done.stderr
    assert heard == [b"question\n\0"]
    assert done.stdout == b"answer\0\xff"


def test_raw_speaks_to_a_plain_socket_client() -> None:
    with listening("--raw", "tcp://127.0.0.1:0") as (server, address):
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"question")
            client.shutdown(socket.SHUT_WR)
            assert server.stdin is not None
            server.stdin.write(b"answer")
            server.stdin.close()
            server.stdin = None
            with client.makefile("rb") as reader:
                assert reader.read() == b"answer"
        assert server.wait(PATIENCE) == 0
        assert server.stdout is not None and server.stdout.read() == b"question"


def still_runs(process: subprocess.Popen[bytes]) -> None:
    """It does not leave by itself: it had longer than --linger to do so, which is 0.5 s if not given."""
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX], ids=["tcp", "unix"])
def test_raw_prints_what_comes_long_after_its_input_ended(family: socket.AddressFamily, tmp_path: Path) -> None:
    """A web server that thinks: the half-close is no reason to leave before the peer's own end."""
    with socket.socket(family) as listener:
        listener.bind(("127.0.0.1", 0) if family == socket.AF_INET else str(tmp_path / "s"))
        listener.listen()
        name = listener.getsockname()
        address = f"tcp://127.0.0.1:{name[1]}" if family == socket.AF_INET else f"unix://{name}"
        with started("cat", "--raw", "--linger", "0", address) as client:
            assert client.stdin is not None and client.stdout is not None
            connection = listener.accept()[0]
            with connection, connection.makefile("rb") as reader:
                client.stdin.write(b"question")
                client.stdin.close()
                client.stdin = None
                assert reader.read() == b"question"
                connection.sendall(b"first half\n")
                assert client.stdout.readline() == b"first half\n"
                still_runs(client)
                connection.sendall(b"second half\n")
            assert finish(client, None) == (b"second half\n", b"")
            assert client.returncode == 0


def test_a_raw_listener_without_input_takes_all_that_its_client_sends() -> None:
    """In a script's background its standard input is /dev/null."""
    with listening("--raw", "--linger", "0", "tcp://127.0.0.1:0", stdin=subprocess.DEVNULL) as (server, address):
        with started("cat", "--raw", address) as client:
            assert client.stdin is not None and server.stdout is not None
            for line in (b"one\n", b"two\n"):
                client.stdin.write(line)
                client.stdin.flush()
                assert server.stdout.readline() == line
                still_runs(server)
            assert finish(client, b"three\n") == (b"", b"")
        assert finish(server, None)[0] == b"three\n"
        assert client.returncode == 0 == server.returncode


def test_a_listener_without_input_stays_where_no_end_can_be_told() -> None:
    with listening("udp://127.0.0.1:0", stdin=subprocess.DEVNULL) as (server, address):
        assert server.stdout is not None
        with sync.connect(address) as channel:
            for line in (b"one\n", b"two\n"):
                channel.send(line)
                assert server.stdout.readline() == line
                still_runs(server)
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE) == -signal.SIGTERM


def test_a_listener_without_input_leaves_after_the_silence_that_was_asked_for() -> None:
    with listening("--linger", "0.2", "udp://127.0.0.1:0", stdin=subprocess.DEVNULL) as (server, address):
        assert run("cat", address, stdin=b"said").returncode == 0
        assert finish(server, None)[0] == b"said"
        assert server.returncode == 0


def test_keep_prints_the_lines_of_many_clients_whole() -> None:
    with listening("--keep", "--lines", "tcp://127.0.0.1:0", stdin=subprocess.DEVNULL) as (server, address):
        lines = [b"%d:%d:" % (number, line) + b"x" * 200 for number in range(3) for line in range(300)]
        clients = []
        for number in range(3):
            mine = b"\n".join(line for line in lines if line.startswith(b"%d:" % number))
            thread = threading.Thread(target=run, args=("cat", "--lines", address), kwargs={"stdin": mine})
            thread.start()
            clients.append(thread)
        assert server.stdout is not None
        heard = [server.stdout.readline().removesuffix(b"\n") for _ in lines]
        for thread in clients:
            thread.join(PATIENCE)
        assert sorted(heard) == sorted(lines)
        for number in range(3):                             # each client's in its order
            mine = [line for line in heard if line.startswith(b"%d:" % number)]
            assert mine == [line for line in lines if line.startswith(b"%d:" % number)]
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE) == -signal.SIGTERM


def test_a_killed_peer_is_one_line_and_status_1(address: str) -> None:
    with listening(address) as (server, real), started("cat", real) as client:
        assert client.stdin is not None and server.stdout is not None
        client.stdin.write(b"x")
        client.stdin.flush()
        assert server.stdout.read(1) == b"x"
        server.kill()
        errors = finish(client, None)[1]
        if not tells_loss(address):             # but it must not wait for its input
            assert (client.returncode, errors) == (0, b"")
            return
        assert client.returncode == 1
        assert errors.startswith(b"anywire: ") and errors.count(b"\n") == 1
        assert b"lost" in errors


def test_a_server_that_closes_ends_the_client_although_its_input_is_open() -> None:
    def handle(channel: Any) -> None:
        channel.send(b"bye\n")

    with serving(handle) as address, started("cat", address) as client:
        assert finish(client, None) == (b"bye\n", b"")
        assert client.returncode == 0


def test_input_that_the_peer_did_not_take_is_status_1() -> None:
    def handle(channel: Any) -> None:
        channel.recv()

    with serving(handle) as address:
        done = run("cat", "--lines", address, stdin=b"line\n" * 1000)
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1


def test_send_only_prints_nothing_and_delivers() -> None:
    heard: list[bytes] = []

    def handle(channel: Any) -> None:
        channel.send(b"not looked at")
        heard.extend(channel)

    with serving(handle) as address:
        done = run("cat", "--send-only", address, stdin=b"data")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert heard == [b"data"]


def test_a_listener_ends_with_its_client_although_its_input_is_open(address: str) -> None:
    """However the client ends: at once (--send-only), or after a half-close that the listener saw first."""
    for half_close in (False, True):
        with listening(address) as (server, real):
            with sync.connect(real) as channel:
                channel.send(b"data")
                if half_close:
                    channel.send_eof()
                    assert server.stdout is not None and server.stdout.read(4) == b"data"
                    with pytest.raises(TimedOut):
                        channel.recv(timeout=0.1)           # takes in that it was confirmed
                # Where an end is told, so is that nothing more is taken, and the listener closes too; elsewhere it
                # ends only when the client has gone.
                began = time.monotonic()
                channel.close(timeout=PATIENCE if tells_loss(address) else 1)
                assert time.monotonic() - began < PATIENCE / 2
                if tells_loss(address):
                    assert channel.unconfirmed == 0
            output, _ = finish(server, None)
            assert server.returncode == 0
            assert output == (b"" if half_close else b"data")


def test_recv_only_leaves_standard_input_alone() -> None:
    def handle(channel: Any) -> None:
        channel.send(b"for you")

    reader, writer = os.pipe()
    try:
        os.write(writer, b"not for us")
        with serving(handle) as address:
            done = subprocess.run(
                [*ANYWIRE, "cat", "--recv-only", address],
                stdin=reader, capture_output=True, timeout=PATIENCE, check=False,
            )
        assert (done.returncode, done.stdout) == (0, b"for you")
        assert os.read(reader, 100) == b"not for us"
    finally:
        os.close(reader)
        os.close(writer)


def test_closed_output_ends_it_quietly_as_cat_does() -> None:
    ended: list[BaseException] = []

    def handle(channel: Any) -> None:
        try:
            while True:
                channel.send(b"line\n" * 1000)
        except (EndOfChannel, PeerLost, OSError) as error:
            ended.append(error)

    with serving(handle) as address, started("cat", "--recv-only", address) as client:
        assert client.stdout is not None and client.stderr is not None
        assert client.stdout.readline() == b"line\n"
        client.stdout.close()
        assert client.wait(PATIENCE) == -signal.SIGPIPE
        assert client.stderr.read() == b""
    assert ended


def test_wait_lets_the_client_start_first() -> None:
    with socket.create_server(("127.0.0.1", 0)) as placeholder:
        port = placeholder.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    with started("cat", "--wait", str(PATIENCE), address, stdout=subprocess.PIPE) as client:
        with listening(address, stdin=subprocess.DEVNULL) as (server, _):
            assert finish(client, b"early")[1] == b""
            assert finish(server, b"")[0] == b"early"
        assert client.returncode == 0 == server.returncode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_listener_by_that_signal(number: signal.Signals) -> None:
    with listening("tcp://127.0.0.1:0") as (server, _):
        server.send_signal(number)
        assert server.wait(PATIENCE) == -number
        assert server.stdout is not None and server.stdout.read() == b""


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["tcp://127.0.0.1:99999"], "^^^^^"),
        (["tcq://127.0.0.1:1"], "known wires"),
        (["inproc://name"], "one process"),
        (["--listen", "pipe:?read=0"], "both ends connect"),
        (["-o", "colour=red", "tcp://127.0.0.1:1"], "colour"),
        (["-o", "colour", "tcp://127.0.0.1:1"], "key=value"),
        (["--keep", "tcp://127.0.0.1:1"], "--listen"),
        (["--raw", "--lines", "tcp://127.0.0.1:1"], "--lines"),
        (["--raw", "udp://127.0.0.1:1"], "carries messages, not a stream of bytes: leave out --raw"),
        (["--raw", "--listen", "udp://127.0.0.1:0"], "leave out --raw"),
        (["--raw", "-o", "type=seqpacket", "unix:@nobody"], "leave out --raw"),
        (["--send-only", "--recv-only", "tcp://127.0.0.1:1"], "contradict"),
        ([], "ADDRESS"),
    ],
)
def test_a_wrong_command_line_is_status_2(arguments: list[str], text: str) -> None:
    done = run("cat", *arguments)
    assert done.returncode == 2
    assert text in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_nobody_listening_is_one_line_and_status_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as placeholder:
        port = placeholder.getsockname()[1]
    done = run("cat", f"tcp://127.0.0.1:{port}")
    assert done.returncode == 1
    assert b"nobody listens" in done.stderr and done.stderr.count(b"\n") == 1
    assert b"use --wait SECONDS" in done.stderr


def test_an_address_in_use_is_one_line_in_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        done = run("cat", "--listen", address)
    assert done.returncode == 1
    assert done.stderr.decode() == f"anywire: listen {address}: Address already in use\n"


@pytest.mark.parametrize("keep", [[], ["--keep"]], ids=["one", "keep"])
def test_a_port_that_the_kernel_chose_is_always_told(keep: list[str]) -> None:
    with started("cat", "--listen", *keep, "tcp://127.0.0.1:0") as server:
        assert server.stderr is not None and server.stdout is not None
        address = server.stderr.readline().decode().removeprefix("anywire: listening: ").strip()
        assert run("cat", "--send-only", address, stdin=b"found").returncode == 0
        assert server.stdout.read(5) == b"found"


def test_a_foreign_peer_is_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def peer() -> None:
            with listener.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.recv(100)

        thread = threading.Thread(target=peer)
        thread.start()
        done = run("cat", f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        thread.join(PATIENCE)
    assert done.returncode == 1
    assert b"HTTP" in done.stderr and done.stderr.count(b"\n") == 1
