"""The registry: built-in wires by name, other packages' by entry point, and clear errors for the rest."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from anywire.contract import wire as registry
from anywire.contract.address import Address
from anywire.contract.errors import AddressError, UnknownWire
from anywire.contract.traits import Traits
from anywire.contract.wire import Acceptor, Wire, known_schemes, register, unregister, wire_for

ROOT = Path(__file__).parents[2]


class SampleWire(Wire):
    schemes = ("sample", "sample2")

    def traits(self, address):
        return Traits(
            frozenset({"message"}), False, "no", "no", "no", "no", "no", False, "none", "1", "none"
        )  # fmt: skip

    def check(self, address):
        raise address.error("host", "nothing is good enough")

    def dial(self, address, options):
        raise ConnectionRefusedError
        yield

    def bind(self, address, options):
        raise PermissionError


@pytest.fixture
def registered():
    register(SampleWire)
    yield SampleWire
    unregister(SampleWire)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Install a package, by hand, that brings wires: a module and its metadata, as pip would leave them."""

    def install(entry_points, module):
        (tmp_path / "elsewhere_wire.py").write_text(module, encoding="utf-8")
        info = tmp_path / "anywire_elsewhere-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: anywire-elsewhere\nVersion: 1.0\n", "utf-8")
        (info / "entry_points.txt").write_text(f"[anywire.wires]\n{entry_points}\n", "utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))

    yield install
    sys.modules.pop("elsewhere_wire", None)
    registry._wires.pop("elsewhere", None)


def test_a_registered_wire_is_found(registered):
    wire = wire_for("sample://x")
    assert isinstance(wire, SampleWire)
    assert wire_for(Address.parse("SAMPLE2:")) is wire
    assert {"sample", "sample2", "tcp", "inproc"} <= set(known_schemes())
    with pytest.raises(AddressError, match="nothing is good enough"):
        wire.check(Address.parse("sample://x"))


def test_registering_nonsense_is_refused():
    with pytest.raises(TypeError, match="subclass"):
        register(int)
    with pytest.raises(TypeError, match="names no schemes"):
        register(type("Nameless", (SampleWire,), {"schemes": ()}))
    with pytest.raises(TypeError, match="abstract"):
        register(type("Half", (Wire,), {"schemes": ("half",)}))
    assert "half" not in known_schemes()


def test_a_program_may_replace_a_built_in_wire():
    class OwnTcp(SampleWire):
        schemes = ("tcp",)

    before = registry._wires.get("tcp")
    register(OwnTcp)
    try:
        assert isinstance(wire_for("tcp://h:1"), OwnTcp)
    finally:
        unregister(OwnTcp)
        if before is not None:
            registry._wires["tcp"] = before


def test_built_in_wires_are_those_of_the_package_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["entry-points"]["anywire.wires"] == registry._BUILT_IN


def test_unknown_schemes_list_the_known_ones():
    with pytest.raises(UnknownWire) as caught:
        wire_for("tcq://h:1")
    error = caught.value
    assert error.scheme == "tcq"
    assert set(registry._BUILT_IN) <= set(error.known)
    assert str(error).startswith("use tcq://h:1: there is no wire 'tcq'; known wires: fifo, ")
    with pytest.raises(AddressError):
        wire_for("no address")


@pytest.mark.parametrize("scheme", ["ucx", "mpi", "nats", "kafka", "auto"])
def test_planned_wires_say_so(scheme):
    with pytest.raises(UnknownWire, match=f"{scheme}: is planned, and not in this version"):
        wire_for(f"{scheme}://x")


GOOD = """
from anywire.contract.wire import Wire
class ElsewhereWire(Wire):
    schemes = ("elsewhere",)
    def traits(self, address): ...
    def check(self, address): ...
    def dial(self, address, options): ...
    def bind(self, address, options): ...
"""


def test_another_package_brings_a_wire(package):
    package("elsewhere = elsewhere_wire:ElsewhereWire", GOOD)
    wire = wire_for("elsewhere://x")
    assert type(wire).__name__ == "ElsewhereWire"
    assert wire_for("elsewhere://y") is wire
    assert "elsewhere" in known_schemes()


@pytest.mark.parametrize(
    ("target", "module", "says"),
    [
        ("elsewhere_wire:ElsewhereWire", "import no_such_module_anywhere", "ModuleNotFoundError: No module named"),
        ("elsewhere_wire:ElsewhereWire", "raise SystemError('broken')", "SystemError: broken"),
        ("elsewhere_wire:Missing", GOOD, "AttributeError"),
        ("elsewhere_wire:ElsewhereWire", "ElsewhereWire = 3", "no subclass of anywire's Wire"),
        ("elsewhere_wire:ElsewhereWire", GOOD.replace("def bind", "def bend"), "abstract"),
    ],
)
def test_a_package_whose_wire_does_not_load_is_named(package, target, module, says):
    package(f"elsewhere = {target}", module)
    with pytest.raises(UnknownWire) as caught:
        wire_for("elsewhere://x")
    assert "'anywire-elsewhere'" in str(caught.value)
    assert says in str(caught.value)


def test_an_acceptor_needs_its_three_methods():
    with pytest.raises(TypeError, match=r"accept.*close.*fileno"):
        Acceptor()


def test_looking_up_a_built_in_scheme_reads_no_package_metadata():
    code = (
        "import sys; import anywire.contract.wire; assert 'importlib.metadata' not in sys.modules, 'metadata';"
        "assert not any(name.startswith('anywire.wires.') for name in sys.modules), 'wires'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
