"""`anywire cat`: standard input and output over any wire, as netcat and socat do for sockets.

Owns: the command's options, connecting and listening, exit statuses and signals; `pump` moves the bytes. The main
thread receives, one thread sends (and with --keep one thread a client receives). Standard input is read only as fast as
the peer takes it, so memory stays flat.

What can go wrong: the peer is lost or refuses (one line on standard error, status 1); standard output is closed (dies
of SIGPIPE, quietly, as cat(1) does); Ctrl-C and SIGTERM (dies of the signal, after the listener's name is gone).
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import click

from anywire import sync
from anywire.cli.pump import OUTPUT, Framing, OutputGone, Pump, write_all
from anywire.cli.signals import Stopped, die_of, stoppable
from anywire.contract.address import Address
from anywire.contract.errors import AnywireError
from anywire.contract.options import resolve_options, shaped, size
from anywire.contract.peer import Peer
from anywire.contract.wire import known_schemes, wire_for

LINGER = 0.5                        # seconds, as socat
MESSAGE_WIRE_CHUNK = 8192           # bytes; datagrams and packets have small limits. socat's block size
STREAM_WIRE_CHUNK = 65536


class Option(click.ParamType):  # type: ignore[type-arg] # generic since click 8.2 only
    """`key=value`."""

    name = "key=value"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> tuple[str, str]:
        """Split it."""
        key, equals, text = str(value).partition("=")
        if not equals or not key.isidentifier():
            self.fail(f"{value!r}: write key=value, for example mode=0600")
        return key, text


class Size(click.ParamType):  # type: ignore[type-arg] # generic since click 8.2 only
    """A number of bytes, perhaps with a unit."""

    name = "size"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        """Read it."""
        try:
            return size(value)
        except ValueError as error:
            self.fail(f"{value!r}: {error}")


def _complete_scheme(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    forms = {"unix": "unix:///", "fifo": "fifo:///", "pipe": "pipe:?"}
    found = [forms.get(scheme, f"{scheme}://") for scheme in known_schemes() if scheme != "inproc"]
    return [form for form in found if form.startswith(text)]


@click.command(
    epilog="""\b
Examples:
  anywire cat --listen unix:///tmp/x              what one client sends, on standard output
  tail -f log | anywire cat unix:///tmp/x
  anywire cat --listen --keep --lines tcp://127.0.0.1:9000     lines of many clients, each whole
  anywire cat --raw tcp://127.0.0.1:80 <request   bare bytes: the peer may be netcat, a web server
  anywire cat --wait 10 -o ca=ca.pem tls://host:9000 <file

\b
Standard input goes as messages: chunks as they come, or with --lines one message a line. Without
--raw both sides must be anywire, and should agree on --lines. Its end is told to the peer, whose
answers are printed until its own end. Where that can't be told, as on udp, mq and sysv, all is
over after --linger seconds of silence once the input has ended; but a listener whose input was
empty stays until a signal or the wire's own limit (udp: -o idle_timeout=60), unless --linger is
given.
Status: 0, 1 if the connection failed or input was not delivered, 2 for a wrong command line.
"""
)
@click.argument("address", shell_complete=_complete_scheme)
@click.option("-l", "--listen", is_flag=True, help="Listen on ADDRESS and serve one client.")
@click.option("-k", "--keep", is_flag=True, help="With --listen: print what any number of clients send; send nothing.")
@click.option("-L", "--lines", is_flag=True, help="Each line is a message, each message is printed as a line.")
@click.option("-0", "--null", is_flag=True, help="As --lines, with NUL instead of newline.")
@click.option("-r", "--raw", is_flag=True, help="Bare bytes instead of messages, for peers that are not anywire.")
@click.option("-s", "--send-only", is_flag=True, help="Print nothing; end when standard input ends.")
@click.option("-d", "--recv-only", is_flag=True, help="Don't read standard input.")
@click.option("-w", "--wait", type=click.FloatRange(0), metavar="SECONDS", help="Wait for the listener or client.")
@click.option("--linger", type=click.FloatRange(0), metavar="SECONDS",
              help="On wires without half-close: end after so long a silence, once the input has ended [default: 0.5].")
@click.option("--chunk", type=Size(), metavar="SIZE", help="Largest message made of input [64KiB; 8KiB on udp].")
@click.option("--max-message", type=Size(), metavar="SIZE", help="Largest message to receive [default: 16MiB].")
@click.option("-o", "--option", "options", type=Option(), multiple=True, help="An option of the wire; repeatable.")
@click.option("-v", "--verbose", is_flag=True, help="Say on standard error who is connected and how much went.")
def cat(
    address: str,
    listen: bool,
    keep: bool,
    lines: bool,
    null: bool,
    raw: bool,
    send_only: bool,
    recv_only: bool,
    wait: float | None,
    linger: float | None,
    chunk: int | None,
    max_message: int | None,
    options: tuple[tuple[str, str], ...],
    verbose: bool,
) -> None:
    """Connect standard input and output to ADDRESS."""
    for wrong, reason in (
        (keep and not listen, "--keep is for --listen"),
        (keep and send_only, "--keep only receives, so --send-only contradicts it"),
        (send_only and recv_only, "--send-only and --recv-only contradict each other"),
        (lines and null, "--lines and --null contradict each other"),
        (raw and (lines or null), "--raw has no messages, so no --lines and no --null"),
        (raw and max_message is not None, "--raw has no messages, so no --max-message"),
        (chunk == 0, "--chunk needs at least 1 byte"),
    ):
        if wrong:
            raise click.UsageError(reason)
    parsed = Address.parse(address)
    wire = wire_for(parsed)
    wire.check(parsed)
    if parsed.scheme == "inproc":
        raise parsed.error("scheme", "inproc stays within one process, so nobody could be at the other end")
    if parsed.scheme == "pipe" and listen:
        raise parsed.error("scheme", "a pipe has no listener: both ends connect, so leave out --listen")
    with _wrong_options():
        values = resolve_options(wire, parsed, dict(options), side="listen" if listen else "connect")
    meant = shaped(wire, parsed, values)        # -o type=seqpacket and the like change what the wire can do
    traits = wire.traits(meant)
    if raw and not traits.has_stream:
        raise click.UsageError(f"{meant} carries messages, not a stream of bytes: leave out --raw")
    keywords: dict[str, Any] = dict(options)
    if max_message is not None:
        keywords["max_message"] = max_message
    framing = Framing(
        separator=b"\n" if lines else b"\0" if null else b"",
        chunk=chunk or (STREAM_WIRE_CHUNK if traits.has_stream else MESSAGE_WIRE_CHUNK),
        raw=raw,
    )

    def say(text: str) -> None:
        if verbose:
            click.echo(f"anywire: {text}", err=True)

    def one(channel: Any) -> None:
        say(f"connected: {channel.address}{_who(channel.peer)}")
        largest = framing.chunk if chunk or raw else min(framing.chunk, channel.max_message)
        pump = Pump(
            channel,
            replace(framing, chunk=largest),
            linger=LINGER if linger is None else linger,
            half_close=channel.traits.promises("half_close"),
            stays=listen and linger is None,
        )
        try:
            if send_only:
                pump.send_only()
            else:
                pump.both(sending=not recv_only)
        finally:
            say(f"sent {pump.sent:,} bytes, received {pump.received:,} bytes")

    try:
        with _wrong_options(), stoppable(), ExitStack() as kept:
            if keep:
                _serve_many(parsed, framing, keywords, say)
            elif listen:
                one(_accept_one(parsed, traits.connection, raw, wait, keywords, say, kept))
            else:
                one(_connect(parsed, raw, wait, keywords))
    except OutputGone:
        die_of(signal.SIGPIPE)
    except Stopped as stopped:
        die_of(stopped.number)


@contextmanager
def _wrong_options() -> Iterator[None]:
    """What a wire says of a wrong -o is a usage error."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if error.__class__ not in (TypeError, ValueError):
            raise
        raise click.UsageError(str(error)) from None


def _who(peer: Peer | None) -> str:
    if peer is None or not (peer.address or peer.pid):
        return ""
    return f", peer {peer.address}" if peer.address else f", peer is process {peer.pid} of user {peer.uid}"


def _connect(address: Address, raw: bool, wait: float | None, keywords: Mapping[str, Any]) -> Any:
    return (sync.connect_stream if raw else sync.connect)(address, wait=wait, **keywords)


def _say_where(asked: Address, real: Address, say: Any) -> None:
    if asked.port == 0:
        click.echo(f"anywire: listening: {real}", err=True)     # else nobody could find it
    else:
        say(f"listening: {real}")


def _accept_one(
    address: Address,
    connection: bool,
    raw: bool,
    wait: float | None,
    keywords: Mapping[str, Any],
    say: Any,
    kept: ExitStack,
) -> Any:
    listener = (sync.listen_stream if raw else sync.listen)(address, **keywords)
    try:
        _say_where(address, listener.addresses[0], say)
        return listener.accept(timeout=wait)
    finally:
        # Others are refused from here on, and the name is free. Wires without connections keep it: it is their way in.
        if connection or sys.exc_info()[0] is not None:
            listener.close()
        else:
            kept.callback(listener.close)


def _serve_many(address: Address, framing: Framing, keywords: Mapping[str, Any], say: Any) -> None:
    over = threading.Event()
    failures: list[Exception] = []
    whole = threading.Lock()

    def handle(channel: Any) -> None:
        say(f"connected: {channel.address}{_who(channel.peer)}")
        try:
            for message in channel:
                try:
                    with whole:
                        write_all(OUTPUT, message + framing.separator)
                except (OutputGone, OSError) as failure:    # for all clients: the next message would be lost too
                    failures.append(failure)
                    channel.abort()                         # its client must not take this for delivered
                    over.set()
                    return
        except AnywireError as error:
            say(str(error))

    server = (sync.serve_stream if framing.raw else sync.serve)(handle, address, **keywords)
    server.start()
    try:
        _say_where(address, server.addresses[0], say)
        over.wait()
        raise failures[0]
    finally:
        server.abort()
