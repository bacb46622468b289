"""The assertions of the Open POSIX Test Suite about message queues, and which test of ours shows each.

The numbers are those of its `conformance/interfaces/mq_*/assertions.xml`; the tests are our own. A value is the name of
a test in test_mqueue.py or test_mqueue_notify.py, or, in NOT_TESTED, why there is nothing to show.
"""

from __future__ import annotations

TESTED: dict[str, dict[str, str]] = {
    "mq_open": {
        "1 20": "test_making_opening_and_what_is_there",
        "2": "test_c_programs_share_the_queue",
        "3 29": "test_making_opening_and_what_is_there",
        "4": "test_as_many_as_descriptors",
        "5 6 7 8 9": "test_access_is_what_was_asked_for",
        "10 18": "test_flags_are_those_of_mq_open",
        "11 19": "test_making_opening_and_what_is_there",
        "12": "test_sizes_not_given_are_the_systems",
        "13": "test_c_programs_share_the_queue",
        "14": "test_limits_are_named_for_who_has_no_privileges",
        "15 23": "test_making_opening_and_what_is_there",
        "16": "test_one_of_many_who_insist_on_making_it_does",
        "21 25 27": "test_a_bad_name_is_named",
        "22": "test_permissions_are_those_of_files",
        "26": "test_limits_are_named_for_who_has_no_privileges",
        "30": "test_the_number_of_queues_is_named",
    },
    "mq_send": {
        "1 8": "test_bytes_come_out_unchanged_with_their_length",
        "2 9 14": "test_a_message_over_the_size_is_refused_and_says_what_to_do",
        "3": "test_higher_priority_first_and_oldest_first_within_one",
        "4 13": "test_priorities_out_of_range",
        "5": "test_waiting_for_a_message_and_for_room",
        "7 10": "test_nonblocking_queues_never_wait",
        "11": "test_access_is_what_was_asked_for",
        "12": "test_signals_run_their_handlers_and_the_wait_goes_on",
    },
    "mq_timedsend": {
        "1 8 18": "test_a_time_out_is_not_looked_at_when_nothing_has_to_wait",
        "2 9 14": "test_a_message_over_the_size_is_refused_and_says_what_to_do",
        "3": "test_any_order_of_priorities",
        "4 13": "test_priorities_out_of_range",
        "5": "test_waiting_for_a_message_and_for_room",
        "7 10": "test_nonblocking_queues_never_wait",
        "11": "test_access_is_what_was_asked_for",
        "12": "test_a_time_out_counts_through_signals",
        "15 20": "test_time_outs",
        "16": "test_a_step_of_the_clock_does_not_matter",
        "19": "test_a_time_out_is_not_looked_at_when_nothing_has_to_wait",
    },
    "mq_receive": {
        "1 4": "test_higher_priority_first_and_oldest_first_within_one",
        "2 12": "test_receiving_into_a_buffer",
        "5": "test_waiting_for_a_message_and_for_room",
        "7 9 10": "test_nonblocking_queues_never_wait",
        "8": "test_bytes_come_out_unchanged_with_their_length",
        "11": "test_access_is_what_was_asked_for",
        "13": "test_signals_run_their_handlers_and_the_wait_goes_on",
    },
    "mq_timedreceive": {
        "1 4": "test_any_order_of_priorities",
        "2 15": "test_receiving_into_a_buffer",
        "5": "test_waiting_for_a_message_and_for_room",
        "7 12 13": "test_nonblocking_queues_never_wait",
        "8": "test_a_step_of_the_clock_does_not_matter",
        "10 11 17": "test_a_time_out_is_not_looked_at_when_nothing_has_to_wait",
        "14": "test_access_is_what_was_asked_for",
        "16": "test_a_time_out_counts_through_signals",
        "18": "test_time_outs",
    },
    "mq_notify": {
        "1 4 6": "test_once_is_once_and_only_into_the_empty_queue",
        "2 7 9": "test_one_at_a_time",
        "3": "test_by_signal",
        "5": "test_who_is_blocked_receiving_gets_it_and_nobody_is_told",
        "8": "test_closing",
    },
    "mq_getattr": {
        "1 3 5": "test_making_opening_and_what_is_there",
        "2": "test_flags_are_those_of_mq_open",
        "4": "test_higher_priority_first_and_oldest_first_within_one",
        "6 7": "test_closing",
    },
    "mq_setattr": {
        "1 3": "test_nonblocking_queues_never_wait",
        "4 5": "test_closing",
    },
    "mq_close": {
        "1 3 4": "test_closing",
        "2": "test_closing_the_queue_ends_it",
    },
    "mq_unlink": {
        "1 2 3 4 7": "test_unlinking_takes_the_name_now_and_the_queue_last",
        "5": "test_permissions_are_those_of_files",
        "6": "test_a_bad_name_is_named",
    },
}

NOT_TESTED: dict[str, dict[str, str]] = {
    "mq_open": {
        "17": "undefined by the standard: O_EXCL alone",
        "24": "mq_open does not sleep on Linux",
        "28": "filling the whole system's table would disturb it",
    },
    "mq_send": {"6": "which of several waiting threads comes first is the scheduler's"},
    "mq_timedsend": {
        "6": "which of several waiting threads comes first is the scheduler's",
        "17": "the resolution is the monotonic clock's, not the wall clock's",
    },
    "mq_receive": {
        "3": "a buffer can't be that large",
        "6": "which of several waiting threads comes first is the scheduler's",
        "14": "the kernel does not damage messages",
    },
    "mq_timedreceive": {
        "3": "a buffer can't be that large",
        "6": "which of several waiting threads comes first is the scheduler's",
        "9": "the resolution is the monotonic clock's, not the wall clock's",
        "19": "the kernel does not damage messages",
    },
    "mq_setattr": {"2": "`blocking` is a property: what it was before is read before"},
    "mq_close": {"5": "undefined by the standard"},
}

COUNTS = {
    "mq_open": 30, "mq_send": 14, "mq_timedsend": 20, "mq_receive": 14, "mq_timedreceive": 19, "mq_notify": 9,
    "mq_getattr": 7, "mq_setattr": 5, "mq_close": 5, "mq_unlink": 7,
}
