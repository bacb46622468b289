"""The assertions of the Open POSIX Test Suite about semaphores and shared memory, and which test of ours shows each.

The numbers are those of its `conformance/interfaces/{sem,shm}_*/assertions.xml`; the tests are our own. A value is the
name of a test in test_semaphore.py (`sem_*`) or test_shared_memory.py (`shm_*`), or, in NOT_TESTED, why there is
nothing to show.
"""

from __future__ import annotations

TESTED: dict[str, dict[str, str]] = {
    "sem_open": {
        "1 8": "test_units",
        "2 4 6 10 11": "test_the_table_of_opening",
        "3": "test_without_permission",
        "5 12": "test_values_that_cannot_be",
        "7": "test_names_that_cannot_be",
        "9 15": "test_by_intent",
        "13": "test_mode_and_umask",
        "14": "test_c_programs_share_named_ones",
    },
    "sem_close": {"1 2": "test_closed", "3": "test_an_owner_removes_the_name", "4": "test_closed"},
    "sem_unlink": {
        "1 2 4 6 8 9": "test_unlinking",
        "3": "test_without_permission",
        "5": "test_names_that_cannot_be",
    },
    "sem_wait": {
        "1 5 9 11 12": "test_units",
        "3 13": "test_threads_are_woken_and_the_gil_is_free",
        "4": "test_killed_with_a_unit",
        "6": "test_closed",
        "7": "test_signals_while_waiting",
    },
    "sem_timedwait": {
        "1 2 3 6 7": "test_time_outs",
        "4 11": "test_units",
        "5": "test_closed",
        "9": "test_signals_while_waiting",
    },
    "sem_post": {
        "1 2 4": "test_units",
        "3": "test_closed",
        "6": "test_signals_while_waiting",
    },
    "sem_getvalue": {"1 2 4 5": "test_units", "3": "test_closed"},
    "sem_init": {
        "1 2 5": "test_places_in_buffers",
        "3": "test_c_programs_share_placed_ones",
        "4": "test_threads_are_woken_and_the_gil_is_free",
        "6": "test_values_that_cannot_be",
    },
    "shm_open": {
        "1 2 9 11": "test_by_intent",
        "4 37 39": "test_names_that_cannot_be",
        "5": "test_c_programs_share_it",
        "12 13 14 15 20 21 22 25 26 27 31 35 41": "test_the_table_of_opening",
        "16 17 18": "test_mode_and_umask",
        "23": "test_8_processes_meet_at_one_name",
        "28": "test_only_an_owner_removes_the_name",
        "32 34": "test_without_permission",
        "38": "test_no_descriptors_left",
        "42": "test_what_fails_leaves_nothing",
    },
    "shm_unlink": {
        "1 2 3 4 5 6 7 11": "test_unlinking",
        "8 9": "test_without_permission",
        "10": "test_names_that_cannot_be",
    },
}

NOT_TESTED: dict[str, dict[str, str]] = {
    "sem_unlink": {"7": "no call of ours could show that another did not wait"},
    "sem_wait": {"2 10": "there are none of these numbers", "8": "a semaphore has no owner: nobody can see a deadlock"},
    "sem_timedwait": {
        "8": "a semaphore has no owner: nobody can see a deadlock",
        "10": "our clock is the monotonic one, on purpose",
    },
    "sem_post": {
        "5": "it does not wait, so no signal interrupts it",
        "7": "there is none of this number",
        "8": "whom the kernel wakes first by real-time priority is its own matter",
    },
    "sem_init": {
        "7 8": "Linux has no limit and no privilege for it",
        "9 11": "undefined by POSIX",
        "10": "all of ours are shared between processes",
    },
    "shm_open": {
        "3 6 7 10 19 24 29": "unspecified or undefined by POSIX",
        "8 30": "the descriptor's number is no promise of ours",
        "33": "/dev/shm is open to all on Linux",
        "36": "it does not wait on Linux",
        "40": "the limit of the whole system: a test would hit others",
    },
}

COUNTS = {
    "sem_open": 15, "sem_close": 4, "sem_unlink": 9, "sem_wait": 13, "sem_timedwait": 11, "sem_post": 8,
    "sem_getvalue": 5, "sem_init": 11, "shm_open": 42, "shm_unlink": 11,
}  # fmt: skip
