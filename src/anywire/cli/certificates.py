"""A certificate authority for one run of the demo or bench: tls refuses to talk without certificates.

Made with the `openssl` command, since Python's standard library can't write X.509, and this adds no dependency for it.
The files lie in the run's own directory and go with it. Blocking, on the main thread. What can go wrong: no `openssl`,
or one that is too old (`NoAuthority`).
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

EXTENSIONS = """[ca]
basicConstraints=critical,CA:TRUE
keyUsage=critical,keyCertSign
subjectKeyIdentifier=hash
[server]
basicConstraints=CA:FALSE
keyUsage=critical,digitalSignature
extendedKeyUsage=serverAuth
subjectAltName=IP:127.0.0.1
subjectKeyIdentifier=hash
authorityKeyIdentifier=keyid
"""


class NoAuthority(Exception):
    """No certificates can be made here."""


def make(directory: Path) -> tuple[Path, Path, Path]:
    """(the authority's certificate, a certificate for 127.0.0.1, its key), valid for a day. Raises NoAuthority."""
    if shutil.which("openssl") is None:
        raise NoAuthority("no openssl command, which makes its throwaway certificates")
    (directory / "extensions").write_text(EXTENSIONS)
    ca, cert, key = directory / "ca.pem", directory / "cert.pem", directory / "key.pem"

    def openssl(*arguments: str) -> None:
        done = subprocess.run(
            ["openssl", *arguments],
            cwd=directory, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
        )
        if done.returncode:
            words = done.stderr.strip().splitlines() or ["no reason given"]
            raise NoAuthority(f"openssl {arguments[0]} failed: {words[0]}")

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", *curve, "-keyout", "ca.key", "-out", "ca.csr", "-subj", "/CN=anywire demo")
    openssl("x509", "-req", "-in", "ca.csr", "-signkey", "ca.key", "-out", ca.name, "-days", "1",
            "-extfile", "extensions", "-extensions", "ca")
    openssl("req", *curve, "-keyout", key.name, "-out", "cert.csr", "-subj", "/CN=127.0.0.1")
    openssl("x509", "-req", "-in", "cert.csr", "-CA", ca.name, "-CAkey", "ca.key", "-CAcreateserial", "-out", cert.name,
            "-days", "1", "-extfile", "extensions", "-extensions", "server")
    return ca, cert, key
