"""tls://: who is trusted, what a failed handshake says, how a connection ends, and bytes under all this unchanged.

What every wire does (order, cancellation, back-pressure ...) is in the conformance suite; here is what only TLS has.
The other side is Python's ssl module or a bare socket where a polite anywire peer would hide the point.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import Certificates, lock, name_in_a_directory

import anywire
from anywire import sync

FRONTS = ("async", "blocking")
SIZES = (0, 1, 2, 100, 16375, 16376, 16377, 16384, 16385, 131064, 131072, 131073, 300_000, 5_000_000)


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(params=FRONTS)
def front(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def echo(channel: Any) -> None:
    for message in channel:
        channel.send(message)


@contextlib.contextmanager
def serving(handler: Callable[[Any], Any], address: str = "tls://127.0.0.1:0", **options: Any) -> Iterator[Any]:
    with sync.serve(handler, address, close_timeout=5, **options) as server:
        yield server.addresses[0]


@contextlib.contextmanager
def serving_stream(handler: Callable[[Any], Any], **options: Any) -> Iterator[Any]:
    with sync.serve_stream(handler, "tls://127.0.0.1:0", close_timeout=5, **options) as server:
        yield server.addresses[0]


def dial(front: str, address: object, use: Callable[[Any], Any] | None = None, **options: Any) -> Any:
    """Connect on a front, and let `use(channel)` do something there: a function, or a coroutine function on async."""

    async def run() -> Any:
        async with anywire.connect(str(address), **options) as channel:
            return await use(channel) if use is not None else channel.peer

    if front == "async":
        return asyncio.run(run())
    with sync.connect(str(address), **options) as channel:
        return use(channel) if use is not None else channel.peer


@contextlib.contextmanager
def raw_listener() -> Iterator[tuple[socket.socket, str]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        yield listener, f"tls://127.0.0.1:{listener.getsockname()[1]}"


def peer_of(listener: socket.socket, pems: Certificates, script: Callable[[ssl.SSLSocket], Any]) -> threading.Thread:
    """A server side made of the ssl module, in a thread: the handshake, then `script`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pems.server)

    def run() -> None:
        sock, _ = listener.accept()
        sock.settimeout(20)
        with context.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False) as tls:
            script(tls)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


# -- bytes ----------------------------------------------------------------------------------------------------------


def test_messages_of_all_sizes_come_back_unchanged(front: str, pems: Certificates) -> None:
    messages = [random.Random(size).randbytes(size) for size in SIZES]

    async def all_async(channel: Any) -> None:
        for message in messages:
            await channel.send(message)
            assert await channel.recv() == message

    def all_blocking(channel: Any) -> None:
        for message in messages:
            channel.send(message)
            assert channel.recv() == message

    with serving(echo, cert=pems.server) as address:
        dial(front, address, all_async if front == "async" else all_blocking, ca=pems.ca)


def test_one_thread_sends_while_another_receives(pems: Certificates) -> None:
    """An ssl object may be used by one thread at a time (SSL_read(3)): both at once must not break a record."""
    chance = random.Random(7)
    messages = [chance.randbytes(chance.choice((0, 1, 50, 5000, 20_000, 200_000))) for _ in range(600)]
    heard: list[bytes] = []
    with serving(echo, cert=pems.server) as address, sync.connect(str(address), ca=pems.ca) as channel:
        receiver = threading.Thread(target=lambda: heard.extend(channel.recv(timeout=20) for _ in messages))
        receiver.start()
        for message in messages:
            channel.send(message)
        receiver.join(30)
    assert heard == messages


def test_a_full_socket_takes_single_bytes_and_large_messages_in_order(pems: Certificates) -> None:
    """What was encrypted and did not fit waits as ciphertext: nothing is encrypted twice, and nothing is left out."""
    go = threading.Event()
    received = bytearray()

    def slow(stream: Any) -> None:
        go.wait(20)
        for chunk in stream:
            received.extend(chunk)

    async def fill(address: str) -> tuple[bytes, bytes]:
        sent = bytearray()
        async with anywire.connect_stream(address, ca=pems.ca) as stream:
            size = 1
            while True:
                data = random.Random(size).randbytes(size)
                try:
                    await stream.write(data, timeout=0.05)
                except anywire.TimedOut:
                    break
                sent += data
                size = size * 3 % 400_009
            # The write that timed out either went whole or not at all; a mark shows which.
            go.set()
            await stream.write(b"mark")
        return bytes(sent), data

    with serving_stream(slow, cert=pems.server) as address:
        sent, doubtful = asyncio.run(fill(str(address)))
    same = bytes(received) in (sent + b"mark", sent + doubtful + b"mark")
    assert same, "too long to be printed"


def test_records_that_come_in_single_bytes(front: str, pems: Certificates) -> None:
    """A relay that passes every byte on alone: the handshake and each record are put together from crumbs."""

    def relay(a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(4096):
                for index in range(len(data)):
                    b.send(data[index : index + 1])
            b.shutdown(socket.SHUT_WR)

    with serving(echo, cert=pems.server) as address, raw_listener() as (listener, near):

        def pass_on() -> None:
            client, _ = listener.accept()
            with client, socket.create_connection(("127.0.0.1", address.port)) as server:
                for sock in (client, server):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                back = threading.Thread(target=relay, args=(server, client))
                back.start()
                relay(client, server)
                back.join()

        thread = threading.Thread(target=pass_on)
        thread.start()

        async def use_async(channel: Any) -> list[bytes]:
            await channel.send_many([b"one", b"two" * 500])
            return [await channel.recv(), await channel.recv()]

        def use_blocking(channel: Any) -> list[bytes]:
            channel.send_many([b"one", b"two" * 500])
            return [channel.recv(), channel.recv()]

        assert dial(front, near, use_async if front == "async" else use_blocking, ca=pems.ca) == [b"one", b"two" * 500]
        thread.join(20)
        assert not thread.is_alive()


# -- trust ----------------------------------------------------------------------------------------------------------


def test_a_certificate_of_an_unknown_authority_is_refused_by_default(front: str, pems: Certificates) -> None:
    with serving(echo, cert=pems.server) as address:
        with pytest.raises(anywire.Refused, match="certificate was not accepted: unable to get local issuer") as caught:
            dial(front, address)
        assert "ca= names the authorities to trust" in str(caught.value)
        assert str(address) in str(caught.value)
        with pytest.raises(anywire.Refused, match="not accepted"):
            dial(front, address, ca=pems.strangers_ca)


def test_the_client_sees_the_servers_certificate(front: str, pems: Certificates) -> None:
    with serving(echo, cert=pems.server) as address:
        peer = dial(front, address, ca=pems.ca)
    assert ("IP Address", "127.0.0.1") in peer.certificate["subjectAltName"]
    assert peer.address == str(address)


def test_a_directory_of_authorities(front: str, pems: Certificates, tmp_path: Path) -> None:
    (tmp_path / name_in_a_directory(pems.ca)).symlink_to(pems.ca)
    with serving(echo, cert=pems.server) as address:
        assert dial(front, address, ca=str(tmp_path)).certificate


def test_a_certificate_for_another_name_is_refused(front: str, pems: Certificates) -> None:
    with serving(echo, cert=pems.other) as address:
        with pytest.raises(anywire.Refused, match="IP address mismatch.*server_name="):
            dial(front, address, ca=pems.ca)
        with pytest.raises(anywire.Refused, match="Hostname mismatch.*server_name="):
            dial(front, address, ca=pems.ca, server_name="localhost")
        assert dial(front, address, ca=pems.ca, server_name="elsewhere.example").certificate
        in_the_address = f"{address}?server_name=elsewhere.example&ca={pems.ca}"
        assert dial(front, in_the_address).certificate


@pytest.mark.parametrize(("which", "words"), [("expired", "has expired"), ("future", "not yet valid.*clock")])
def test_a_certificate_out_of_its_time_is_refused(front: str, pems: Certificates, which: str, words: str) -> None:
    with serving(echo, cert=getattr(pems, which)) as address, pytest.raises(anywire.Refused, match=words):
        dial(front, address, ca=pems.ca)


def test_mutual_tls(front: str, pems: Certificates, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "anywire")
    seen: list[Any] = []

    def handle(channel: Any) -> None:
        seen.append(channel.peer.certificate)
        echo(channel)

    async def say_async(channel: Any) -> bytes:
        await channel.send(b"hello")
        return bytes(await channel.recv())

    def say_blocking(channel: Any) -> bytes:
        channel.send(b"hello")
        return bytes(channel.recv())

    say = say_async if front == "async" else say_blocking
    with serving(handle, cert=pems.server, ca=pems.ca) as address:
        assert dial(front, address, say, ca=pems.ca, cert=pems.client) == b"hello"
        assert seen[0]["subjectAltName"] == (("email", "client@example.org"),)
        with pytest.raises((anywire.Refused, anywire.PeerLost)) as caught:
            dial(front, address, ca=pems.ca)
        assert "certificate required" in str(caught.value)
        assert "cert= and key=" in str(caught.value)
        with pytest.raises((anywire.Refused, anywire.PeerLost)) as caught:
            dial(front, address, ca=pems.ca, cert=pems.strange_client)
        assert "unknown ca" in str(caught.value)
        assert "did not accept this side's certificate" in str(caught.value)
    assert len(seen) == 1, "a handler ran for a client that was refused"
    assert "peer did not return a certificate" in caplog.text
    assert "the peer's certificate was not accepted: unable to get local issuer certificate" in caplog.text


def test_authorize_decides_by_the_certificate(front: str, pems: Certificates) -> None:
    def only_alice(peer: anywire.Peer) -> bool | str:
        assert peer.certificate is not None
        return "alice" in str(peer.certificate) or "you are not alice"

    with (
        serving(echo, cert=pems.server, ca=pems.ca, authorize=only_alice) as address,
        pytest.raises(anywire.Refused, match="you are not alice"),
    ):
        dial(front, address, ca=pems.ca, cert=pems.client)


def test_a_context_of_the_users(front: str, pems: Certificates) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pems.server)
    server.maximum_version = ssl.TLSVersion.TLSv1_2
    names: list[str | None] = []
    server.sni_callback = lambda _, name, __: names.append(name)  # type: ignore[assignment]
    client = ssl.create_default_context(cafile=pems.ca)
    with serving(echo, ssl_context=server) as address:
        assert dial(front, address, ssl_context=client, server_name="localhost").certificate
        assert dial(front, str(address).replace("127.0.0.1", "localhost"), ssl_context=client).certificate
    assert names == ["localhost", "localhost"]


def test_application_protocols(front: str, pems: Certificates) -> None:
    heard: list[str | None] = []

    def handle(channel: Any) -> None:
        heard.append(channel.peer.alpn)

    with serving(handle, cert=pems.server, alpn=["two", "one"]) as address:
        assert dial(front, address, ca=pems.ca, alpn=("one", "two")).alpn == "two", "the listener's order counts"
        assert dial(front, f"{address}?alpn=one,zero", ca=pems.ca).alpn == "one"
        assert dial(front, address, ca=pems.ca).alpn is None
    assert heard == ["two", "one", None]


def test_options_that_can_not_work_are_refused_at_once(front: str, pems: Certificates, tmp_path: Path) -> None:
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    listen = anywire.listen if front == "async" else sync.listen
    for options, words in (
        ({}, "a listener needs a certificate"),
        ({"key": pems.server}, "key= needs cert="),
        ({"cert": pems.ca}, "OpenSSL can't use"),
        ({"ssl_context": server, "cert": pems.server}, "leave out cert"),
        ({"ssl_context": client}, "for the other side; listen needs"),
        ({"ssl_context": "yes"}, "an ssl.SSLContext"),
    ):
        with pytest.raises(ValueError, match=words):
            listen("tls://127.0.0.1:0", **options)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pem"):
        listen("tls://127.0.0.1:0", cert=str(tmp_path / "nowhere.pem"))
    with pytest.raises(ValueError, match="for the other side; connect needs"):
        dial(front, "tls://127.0.0.1:1", ssl_context=server)
    locked = tmp_path / "locked.pem"
    lock(pems.server, b"secret", locked)
    with pytest.raises(ValueError, match="the private key is encrypted"):
        listen("tls://127.0.0.1:0", cert=pems.server, key=str(locked))


@pytest.mark.parametrize("option", ["ca", "cert", "key"])
def test_a_file_that_is_missing_is_named_and_not_waited_for(
    front: str, pems: Certificates, tmp_path: Path, option: str
) -> None:
    missing = str(tmp_path / "nowhere.pem")
    files = {"ca": pems.ca, "cert": pems.client, "key": pems.client, option: missing}
    with serving(echo, cert=pems.server) as address:
        with pytest.raises(FileNotFoundError, match=f"connect tls://.*: {option}= .*{missing}") as caught:
            dial(front, address, wait=60, **files)
        assert caught.value.filename == missing
        with pytest.raises(FileNotFoundError, match=missing):
            next(sync.connect_forever(address, backoff=(0.001, 0.001), **files))


def test_a_certificate_that_is_not_accepted_is_not_waited_for(front: str, pems: Certificates) -> None:
    with serving(echo, cert=pems.server) as address:
        with pytest.raises(anywire.Refused, match="certificate") as caught:
            dial(front, address, wait=60)
        assert caught.value.answered
        with pytest.raises(anywire.Refused, match="certificate"):
            next(sync.connect_forever(address, backoff=(0.001, 0.001)))


def test_a_renewed_certificate_is_read_again(front: str, pems: Certificates, tmp_path: Path) -> None:
    current = tmp_path / "current.pem"
    for source, ok in ((pems.other, False), (pems.server, True)):
        current.write_bytes(Path(source).read_bytes())
        os.utime(current, ns=(0, 1 if ok else 2))
        with serving(echo, cert=str(current)) as address:
            if ok:
                assert dial(front, address, ca=pems.ca).certificate
            else:
                with pytest.raises(anywire.Refused, match="mismatch"):
                    dial(front, address, ca=pems.ca)


# -- strangers ------------------------------------------------------------------------------------------------------


def test_a_plain_client_at_a_tls_port(front: str, pems: Certificates, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "anywire")
    with serving(echo, cert=pems.server) as address:
        plain = f"tcp://127.0.0.1:{address.port}"
        with pytest.raises(anywire.BadFrame, match="a TLS alert .one end uses tls://, the other does not"):
            dial(front, plain)
        with socket.create_connection(("127.0.0.1", address.port)) as browser:
            browser.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                while browser.recv(100):
                    pass
        assert dial(front, address, ca=pems.ca).certificate, "the listener goes on"
    assert "the peer does not speak TLS: an anywire preamble" in caplog.text
    assert "the peer does not speak TLS: an HTTP request" in caplog.text


def test_a_tls_client_at_a_plain_port(front: str, pems: Certificates, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "anywire")
    with (
        serving(echo, "tcp://127.0.0.1:0") as address,
        pytest.raises(anywire.PeerLost, match="the other end may not be tls://"),
    ):
        dial(front, f"tls://127.0.0.1:{address.port}", ca=pems.ca)
    assert "a TLS ClientHello (one end uses tls://, the other does not)" in caplog.text


def test_a_tls_client_at_a_port_that_greets_first(front: str, pems: Certificates) -> None:
    with raw_listener() as (listener, address):

        def greet() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                sock.recv(1000)

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(anywire.BadFrame, match="an SSH banner"):
            dial(front, address, ca=pems.ca)
        thread.join(10)


def test_a_silent_server_is_given_up(front: str, pems: Certificates) -> None:
    with raw_listener() as (_, address), pytest.raises(anywire.TimedOut, match="TLS handshake.*handshake_timeout="):
        dial(front, address, ca=pems.ca, handshake_timeout=0.2)


def test_a_silent_client_is_dropped(front: str, pems: Certificates) -> None:
    """Also one that has begun; others are served meanwhile."""
    hello = ssl.MemoryBIO()
    beginning = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        beginning.do_handshake()
    with serving(echo, cert=pems.server, handshake_timeout=1.5) as address:
        silent = socket.create_connection(("127.0.0.1", address.port), timeout=20)
        begun = socket.create_connection(("127.0.0.1", address.port), timeout=20)
        with silent, begun:
            begun.sendall(hello.read()[:50])
            assert dial(front, address, ca=pems.ca).certificate
            for sock in (silent, begun):
                with contextlib.suppress(ConnectionResetError):
                    assert sock.recv(100) == b""


# -- ends -----------------------------------------------------------------------------------------------------------


def read_all(front: str, address: str, **options: Any) -> tuple[bytes, BaseException | None]:
    """What a stream gave, and the error that it ended with."""
    got = bytearray()

    async def run() -> None:
        async with anywire.connect_stream(address, **options) as stream:
            async for chunk in stream:
                got.extend(chunk)

    try:
        if front == "async":
            asyncio.run(run())
        else:
            with sync.connect_stream(address, **options) as stream:
                for chunk in stream:
                    got.extend(chunk)
    except anywire.AnywireError as error:
        return bytes(got), error
    return bytes(got), None


def test_close_notify_is_an_end(front: str, pems: Certificates) -> None:
    def polite(tls: ssl.SSLSocket) -> None:
        tls.sendall(b"all of it" * 10_000)
        tls.unwrap().close()

    with raw_listener() as (listener, address):
        thread = peer_of(listener, pems, polite)
        assert read_all(front, address, ca=pems.ca) == (b"all of it" * 10_000, None)
        thread.join(10)


def test_a_truncated_stream_is_a_loss(front: str, pems: Certificates) -> None:
    """RFC 8446 6.1: without close_notify somebody may have cut it off. What came before is still read."""

    def cut(tls: ssl.SSLSocket) -> None:
        tls.sendall(b"a part" * 10_000)
        tls.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            tls.recv(100)

    with raw_listener() as (listener, address):
        thread = peer_of(listener, pems, cut)
        got, error = read_all(front, address, ca=pems.ca)
        thread.join(10)
    assert got == b"a part" * 10_000
    assert isinstance(error, anywire.PeerLost)
    assert "without TLS's close_notify" in str(error)


def test_a_forged_record_is_a_loss(front: str, pems: Certificates) -> None:
    def forge(tls: ssl.SSLSocket) -> None:
        tls.sendall(b"true")
        os.write(tls.fileno(), b"\x17\x03\x03\x00\x20" + bytes(32))
        with contextlib.suppress(OSError):
            tls.recv(100)

    with raw_listener() as (listener, address):
        thread = peer_of(listener, pems, forge)
        got, error = read_all(front, address, ca=pems.ca)
        thread.join(10)
    assert got == b"true"
    assert isinstance(error, anywire.PeerLost)
    assert "decryption failed or bad record mac" in str(error)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_after_write_eof_the_peer_may_still_send(front: str, pems: Certificates, version: ssl.TLSVersion) -> None:
    """One way is closed (RFC 8446 6.1; older peers may answer a close at once, RFC 5246 7.2.1: anywire's do not)."""
    context = ssl.create_default_context(cafile=pems.ca)
    context.minimum_version = context.maximum_version = version

    def answer(stream: Any) -> None:
        question = b"".join(stream)
        stream.write(question[::-1] * 1000)

    async def ask_async(address: str) -> bytes:
        async with anywire.connect_stream(address, ssl_context=context) as stream:
            await stream.write(b"question" * 1000)
            await stream.write_eof()
            with pytest.raises(anywire.ChannelClosed):
                await stream.write(b"more")
            return b"".join([chunk async for chunk in stream])

    with serving_stream(answer, cert=pems.server) as address:
        if front == "async":
            got = asyncio.run(ask_async(str(address)))
        else:
            with sync.connect_stream(str(address), ssl_context=context) as stream:
                stream.write(b"question" * 1000)
                stream.write_eof()
                with pytest.raises(anywire.ChannelClosed):
                    stream.write(b"more")
                got = b"".join(stream)
    assert got == b"noitseuq" * 1_000_000


def test_a_channel_half_closes_by_its_end_frame(front: str, pems: Certificates) -> None:
    def answer(channel: Any) -> None:
        messages = list(channel)
        channel.send_many(messages * 100)

    async def ask_async(channel: Any) -> list[bytes]:
        await channel.send_many([b"a", b"b"])
        await channel.send_eof()
        return [message async for message in channel]

    def ask_blocking(channel: Any) -> list[bytes]:
        channel.send_many([b"a", b"b"])
        channel.send_eof()
        return list(channel)

    with serving(answer, cert=pems.server) as address:
        got = dial(front, address, ask_async if front == "async" else ask_blocking, ca=pems.ca)
    assert got == [b"a", b"b"] * 100


@contextlib.contextmanager
def server_process(pems: Certificates, handler: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own whose handler runs the code `handler`: the process, its address."""
    program = (
        "import sys, anywire, anywire.sync\n"
        "def handle(channel):\n"
        f"    {handler}\n"
        f"with anywire.sync.serve(handle, 'tls://127.0.0.1:0', cert={pems.server!r}) as server:\n"
        "    print(server.addresses[0], flush=True); server.serve_forever()\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            yield child, child.stdout.readline().strip()
        finally:
            child.kill()


def test_a_killed_peer_is_a_loss_and_what_it_sent_is_read(front: str, pems: Certificates) -> None:
    # So little that all of it is in our kernel when "sent" comes: the kernel of a killed process that had not read
    # everything resets the connection, and what did not fit our window yet is gone (RFC 1122, 4.2.2.13).
    code = "channel.recv(); channel.send_many([b'x' * 8_000] * 3); print('sent', flush=True); sys.stdin.read()"
    with server_process(pems, code) as (child, address):
        assert child.stdout is not None
        wait_until_sent = child.stdout.readline

        def check(got: list[bytes], error: anywire.PeerLost) -> None:
            assert got == [b"x" * 8_000] * 3
            assert error.unconfirmed == 2

        async def lose_async(channel: Any) -> None:
            await channel.send(b"begin")
            got = [await channel.recv()]
            await channel.send_many([b"never read"] * 2)
            assert await asyncio.to_thread(wait_until_sent) == "sent\n"
            child.send_signal(signal.SIGKILL)
            with pytest.raises(anywire.PeerLost) as caught:
                while True:
                    got.append(await channel.recv(timeout=10))
            check(got, caught.value)

        def lose_blocking(channel: Any) -> None:
            channel.send(b"begin")
            got = [channel.recv()]
            channel.send_many([b"never read"] * 2)
            assert wait_until_sent() == "sent\n"
            child.send_signal(signal.SIGKILL)
            with pytest.raises(anywire.PeerLost) as caught:
                while True:
                    got.append(channel.recv(timeout=10))
            check(got, caught.value)

        with pytest.raises(anywire.PeerLost):      # close() tells it again: messages are unconfirmed
            dial(front, address, lose_async if front == "async" else lose_blocking, ca=pems.ca)


def test_close_wakes_a_thread_that_receives(pems: Certificates) -> None:
    with serving(echo, cert=pems.server) as address:
        channel = sync.connect(str(address), ca=pems.ca)
        channel.send(b"one")
        assert channel.recv() == b"one"
        ended: list[BaseException] = []

        def receive() -> None:
            try:
                channel.recv()
            except anywire.AnywireError as error:
                ended.append(error)

        thread = threading.Thread(target=receive)
        thread.start()
        channel.close()
        thread.join(10)
        assert not thread.is_alive()
        assert isinstance(ended[0], (anywire.EndOfChannel, anywire.ChannelClosed))


# -- giving up ------------------------------------------------------------------------------------------------------


def sockets_open() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [target for target in found if target.startswith("socket:")]


def test_a_connect_that_is_given_up_leaves_no_descriptor(pems: Certificates) -> None:
    """Cancelled at every turn of the loop, from the name's look-up to the preamble."""

    async def run(address: str) -> int:
        finished = 0
        for turns in range(200):
            before = sockets_open()
            task = asyncio.ensure_future(anywire.connect(address, ca=pems.ca).__aenter__())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            try:
                channel = await task
            except asyncio.CancelledError:
                assert sockets_open() == before, f"cancelled after {turns} turns"
            else:
                finished += 1
                channel.abort()
        return finished

    with server_process(pems, "channel.recv()") as (_, address):
        asyncio.run(run(address))


def test_cancelled_sends_and_receives_lose_and_break_nothing(pems: Certificates) -> None:
    async def run(address: str) -> None:
        async with anywire.connect(address, ca=pems.ca) as channel:
            chance = random.Random(3)
            sent: list[bytes] = []
            heard: list[bytes] = []
            doubtful: set[bytes] = set()
            for number in range(300):
                data = number.to_bytes(4, "big") * chance.choice((1, 2000, 100_000))
                task = asyncio.ensure_future(channel.send(data))
                for _ in range(chance.randrange(3)):
                    await asyncio.sleep(0)
                task.cancel()
                try:
                    await task
                    sent.append(data)
                except asyncio.CancelledError:
                    doubtful.add(data)
                try:
                    async with asyncio.timeout(chance.choice((0, 0.001))):
                        heard.append(await channel.recv())
                except TimeoutError:
                    pass
            await channel.send(b"end")
            while (message := await channel.recv(timeout=20)) != b"end":
                heard.append(message)
            assert [message for message in heard if message not in doubtful] == sent
            assert len(set(heard)) == len(heard)
            assert set(heard) - set(sent) <= doubtful

    with serving(echo, cert=pems.server) as address:
        asyncio.run(run(str(address)))


def test_a_tls_connection_does_not_move(front: str, pems: Certificates) -> None:
    async def move_async(channel: Any) -> None:
        with pytest.raises(anywire.Unsupported, match="detach"):
            channel.detach()

    def move_blocking(channel: Any) -> None:
        with pytest.raises(anywire.Unsupported, match="detach"):
            channel.detach()

    with serving(echo, cert=pems.server) as address:
        dial(front, address, move_async if front == "async" else move_blocking, ca=pems.ca)
    listener = sync.listen("tls://127.0.0.1:0", cert=pems.server)
    with pytest.raises(anywire.Unsupported, match="the private key|same cert="):
        listener.detach()
    listener.close()


HANDLER_USES_THE_CONNECTION = """
import signal, sys, threading
from anywire import sync

address, ca = sys.argv[1:]
channel = sync.connect(address, ca=ca)
signals = 0

def handler(*_):
    global signals
    signals += 1
    channel.try_send(b"from the handler")

signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
got = 0
while got < 20000 or signals < 200:
    got += channel.recv(timeout=30) == b"flood"
signal.setitimer(signal.ITIMER_REAL, 0)
channel.abort()
"""


def test_a_signal_handler_may_use_the_connection_that_it_interrupts(pems: Certificates) -> None:
    def flood(channel: Any) -> None:
        draining = threading.Thread(target=lambda: drain(channel))
        draining.start()
        with contextlib.suppress(anywire.AnywireError, OSError):
            while True:
                channel.send(b"flood")
        draining.join(20)

    def drain(channel: Any) -> None:
        with contextlib.suppress(anywire.AnywireError, OSError):
            for _ in channel:
                pass

    with serving(flood, cert=pems.server) as address:
        done = subprocess.run(
            [sys.executable, "-c", HANDLER_USES_THE_CONNECTION, str(address), str(pems.ca)], timeout=60, check=False
        )
    assert done.returncode == 0
