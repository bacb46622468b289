"""Standard input and output that are closed: no descriptor of ours takes their place, and using them is an error."""

from __future__ import annotations

import socket
import subprocess
import threading

import pytest
from cli_processes import ANYWIRE, PATIENCE, listening, run

from anywire import sync


def run_with(closing: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command with what the shell says of its descriptors; input is /dev/null if not closed."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {closing}', "sh", *ANYWIRE, *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, check=False,
    )


@pytest.mark.parametrize(
    ("closing", "errors"),
    [
        (">&-", b"anywire: standard output: Bad file descriptor\n"),
        ("<&-", b"anywire: standard input: Bad file descriptor\n"),
        ("<&- >&- 2>&-", b""),
    ],
)
def test_the_connection_does_not_become_standard_input_or_output(closing: str, errors: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def peer() -> None:
            with listener.accept()[0] as connection:
                try:
                    connection.sendall(b"for your eyes only")
                    while data := connection.recv(100):
                        came.append(data)
                except OSError:
                    pass                        # it left, with what we said unread

        came: list[bytes] = []
        thread = threading.Thread(target=peer)
        thread.start()
        done = run_with(closing, "cat", "--raw", f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        thread.join(PATIENCE)
    assert came == []
    assert done.returncode == 1
    assert done.stderr == errors


def test_closed_input_is_no_error_if_it_is_not_read() -> None:
    with sync.serve(lambda channel: channel.send(b"for you"), "tcp://127.0.0.1:0") as server:
        done = run_with("<&-", "cat", "--recv-only", str(server.addresses[0]))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"for you", b"")


@pytest.mark.parametrize("command", ["--version", "--help", "cat --help", "completion bash"])
def test_closed_output_is_an_error_of_every_command(command: str) -> None:
    done = run_with(">&-", *command.split())
    assert (done.returncode, done.stderr) == (1, b"anywire: Bad file descriptor\n")


def test_a_full_disk_is_one_line_also_for_version() -> None:
    done = run_with(">/dev/full", "--version")
    assert (done.returncode, done.stderr) == (1, b"anywire: No space left on device\n")


def test_many_clients_are_not_served_when_nothing_can_be_printed() -> None:
    with open("/dev/full", "wb") as full, listening("--keep", "tcp://127.0.0.1:0", stdout=full) as (server, address):
        assert run("cat", address, stdin=b"lost").returncode == 1
        assert server.wait(PATIENCE) == 1
        assert server.stderr is not None
        assert server.stderr.read().endswith(b"anywire: standard output: No space left on device\n")
