"""One suite over every wire, both fronts: the contract that each wire signs.

`wires.py` says what each wire promises; `fronts.py` lets one test body drive the async and the blocking front;
`world.py` connects a channel under test with a peer in another process (`peer.py`, `roles.py`); `frames.py` speaks the
bytes of a framed connection by hand. The `test_*.py` files hold the scenarios, one guarantee a file.
`faults.py` breaks the library on purpose, and `test_faults.py` checks that the suite notices.
"""
