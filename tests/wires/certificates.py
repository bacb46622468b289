"""Certificates for the TLS tests: an authority, what it issued, and what nobody trusts. Made once, by trustme."""

from __future__ import annotations

import datetime
from pathlib import Path

import trustme


class Certificates:
    """PEM files in one directory. Those of leaves hold the key, too."""

    def __init__(self, directory: Path) -> None:
        authority = trustme.CA()
        stranger = trustme.CA()
        self.directory = directory
        self.ca = self.write("ca", authority.cert_pem)
        self.strangers_ca = self.write("strangers-ca", stranger.cert_pem)
        now = datetime.datetime.now(datetime.UTC)
        day = datetime.timedelta(days=1)
        here = ("localhost", "127.0.0.1", "::1")
        self.server = self.issue("server", authority.issue_cert(*here))
        self.client = self.issue("client", authority.issue_cert("client@example.org"))
        self.strange_client = self.issue("strange-client", stranger.issue_cert("client@example.org"))
        self.other = self.issue("other", authority.issue_cert("elsewhere.example"))
        self.expired = self.issue("expired", authority.issue_cert(*here, not_before=now - 9 * day, not_after=now - day))
        self.future = self.issue("future", authority.issue_cert(*here, not_before=now + day, not_after=now + 9 * day))

    def write(self, name: str, *pems: trustme.Blob) -> str:
        path = self.directory / f"{name}.pem"
        path.write_bytes(b"".join(pem.bytes() for pem in pems))
        return str(path)

    def issue(self, name: str, leaf: trustme.LeafCert) -> str:
        return self.write(name, leaf.private_key_pem, *leaf.cert_chain_pems)
