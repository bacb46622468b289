"""The interpreter's own tests of connections, queues and pools, with anywire.multiprocessing in the standard one's
place.

scripts/standard_tests.py runs this module; spawned children import it by its name to find the tests' functions. It
takes the start method from ANYWIRE_START_METHOD, and replaces the names in the standard modules before the tests look
at them.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.queues
import os
from typing import Any

from anywire import multiprocessing as ours
from anywire.multiprocessing import queues

REPLACED = ("Pipe", "Queue", "JoinableQueue", "SimpleQueue", "Pool", "get_context")
CASES = {
    "_TestQueue", "TestSimpleQueue", "_TestConnection", "_TestPoll", "_TestPollEintr", "_TestPicklingConnections",
    "TestWait", "TestTimeouts", "TestIgnoreEINTR", "TestCloseFds", "_TestPool", "_TestPoolWorkerErrors",
    "_TestPoolWorkerLifetime", "TestPoolNotLeakOnFailure", "TestInitializers", "_TestProcess",
    "_TestSubclassingProcess",
}

for name in REPLACED:
    setattr(multiprocessing, name, getattr(ours, name))
for name in ("Queue", "JoinableQueue", "SimpleQueue"):
    setattr(multiprocessing.queues, name, getattr(queues, name))

from test import _test_multiprocessing as standard  # noqa: E402 - the names above come first

_all: dict[str, Any] = {"__name__": __name__}
standard.install_tests_in_module_dict(_all, os.environ["ANYWIRE_START_METHOD"])
setUpModule, tearDownModule = _all["setUpModule"], _all["tearDownModule"]
for name in CASES:
    case = "WithProcesses" + name[1:] if name.startswith("_") else name
    if case in _all:
        globals()[case] = _all[case]
