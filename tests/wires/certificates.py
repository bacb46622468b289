"""Certificates for the TLS tests: an authority, what it issued, and what nobody trusts. Made once, by trustme."""

from __future__ import annotations

import datetime
import hashlib
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import serialization


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


def name_in_a_directory(path: str) -> str:
    """What a certificate is called in a directory of authorities: the hash of its subject (openssl-rehash(1)).

    OpenSSL's X509_NAME_hash: SHA-1 over the subject's relative names, each value in UTF-8 and lower case."""
    subject = x509.load_pem_x509_certificate(Path(path).read_bytes()).subject
    canonical = b""
    for attribute in subject:
        value = " ".join(str(attribute.value).lower().split())
        name = x509.Name([x509.NameAttribute(attribute.oid, value)]).public_bytes()
        canonical += name[2:]  # without the outer sequence's tag and (short) length
    return hashlib.sha1(canonical, usedforsecurity=False).digest()[3::-1].hex() + ".0"


def lock(path: str, password: bytes, to: Path) -> None:
    """Write the private key of a PEM file to another one, encrypted."""
    key = serialization.load_pem_private_key(Path(path).read_bytes(), None)
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    to.write_bytes(key.private_bytes(*form, serialization.BestAvailableEncryption(password)))
