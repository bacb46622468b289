"""How fast is TLS on each event loop? An echo of 1 KiB and 64 KiB by a protocol, under a native client.

The client is C and uses the installed libssl; it compares every byte. The key is an elliptic curve's, the version and
cipher are what both sides' defaults make them (TLS 1.3, AES-256-GCM). To be shown for anywire's loop: 1.3 × uvloop.
rloop has no TLS.

Compare `server_cpu_us`, CPU time of the server for one message: the client has as much to encrypt and decrypt as the
server, and is busy nearly all of the time, so that the rate shows less of a difference than there is.
"""

from __future__ import annotations

import contextlib
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path

from anywire.cli.certificates import NoAuthority, make
from anywire.cli.measure import size_name, turns
from benchmarks import loops
from benchmarks.harness import SERVER_CORE, Child, Report, load_tls, native_programs, options

CELLS = ((50, 1 << 10), (10, 64 << 10))
TARGET = 1.3
KINDS = {"protocol": loops.serve_protocol, "streams": loops.serve_streams}


def serve(name: str, directory: str) -> None:
    kind, _, loop = name.partition(", ")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(Path(directory, "cert.pem"), Path(directory, "key.pem"))
    loops.run(loop, KINDS[kind](ssl=context))


def main() -> None:
    parser = options(__doc__, rounds=5, seconds=0.8)
    parser.add_argument("--certificates", help="for the servers that this starts")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.certificates)
        return
    report = Report("tls_echo: bytes back over TLS on each event loop", loops.PACKAGES)
    report.begin()
    here = [loop for loop in loops.installed(report) if loop != "rloop"]
    with native_programs() as programs, tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        try:
            make(Path(directory))
        except NoAuthority as error:
            raise SystemExit(str(error)) from None
        servers = {}
        for name in (f"{kind}, {loop}" for kind in KINDS for loop in here):
            command = (sys.executable, "-m", "benchmarks.tls_echo", "--certificates", directory, "--serve", name)
            servers[name] = stack.enter_context(Child(SERVER_CORE, *command))
        ports = {name: loops.port_of(server) for name, server in servers.items()}
        for number in range(arguments.rounds):
            for connections, size in CELLS:
                for name in turns(list(servers), number):
                    one = (programs, ports[name], connections, size, arguments.seconds, servers[name].pid)
                    try:
                        figures: dict[str, float] | str = load_tls(*one)
                    except (RuntimeError, subprocess.TimeoutExpired) as error:
                        figures = str(error)
                    report.results.add(f"{connections} × {size_name(size)}", name, figures)
    for cell in report.results.cells:
        report.rates(cell, "protocol, uvloop", "rate", ("server_cpu_us", "mean_us", "client_load"))
        for kind in KINDS if "anywire" in here else ():
            ours, base = f"{kind}, anywire", f"{kind}, uvloop"
            report.claim(f"{ours}, {cell}, of {base}", report.results.ratio(cell, ours, base, "rate"), TARGET)
            cpu = report.results.ratio(cell, base, ours, "server_cpu_us")
            if cpu is not None:
                report.note(f"      {ours}: {cpu:.2f} × by CPU time of the server")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
