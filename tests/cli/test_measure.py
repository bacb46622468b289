"""Medians and ratios over rounds, and what a failed round does to them."""

from anywire.cli.measure import Results, human, machine, size_name, table, times, turns


def test_a_ratio_is_the_median_of_each_rounds_ratio() -> None:
    results = Results()
    # The machine is four times slower in the last two rounds: the medians alone would say 10 / 40.
    for ours, peer in ((20, 10), (40, 40), (10, 5)):
        results.add("cell", "ours", {"rate": ours})
        results.add("cell", "peer", {"rate": peer})
    assert results.median("cell", "ours", "rate") == 20
    assert results.ratio("cell", "ours", "peer", "rate") == 2
    assert results.ratio("cell", "peer", "ours", "rate") == 0.5


def test_a_failed_round_is_left_out_and_its_error_kept() -> None:
    results = Results()
    results.add("cell", "ours", "no such file")
    results.add("cell", "ours", {"rate": 30.0})
    results.add("cell", "peer", {"rate": 1.0})
    results.add("cell", "peer", {"rate": 10.0})
    assert results.ratio("cell", "ours", "peer", "rate") == 3
    assert results.errors == {("cell", "ours"): "no such file"}
    assert results.as_json()["cell"]["ours"] == {
        "median": {"rate": 30.0},
        "rounds": [None, {"rate": 30.0}],
        "error": "no such file",
    }


def test_no_figure_is_none_not_zero() -> None:
    results = Results()
    results.add("cell", "ours", {"rate": 1.0})
    assert results.median("cell", "peer", "rate") is None
    assert results.median("other", "ours", "rate") is None
    assert results.ratio("cell", "ours", "peer", "rate") is None
    assert times(None) == "–" == human(None)


def test_the_order_turns_round_each_round() -> None:
    assert turns("abc", 0) == ["a", "b", "c"]
    assert turns("abc", 1) == ["c", "b", "a"]


def test_numbers_for_people() -> None:
    assert [human(value) for value in (0.1234, 999, 12_345, 2.5e6, 7e9)] == ["0.123", "999", "12.3 k", "2.5 M", "7 G"]
    assert [size_name(size) for size in (64, 1000, 1024, 16 << 20)] == ["64 B", "1000 B", "1 KiB", "16 MiB"]
    assert table(["name", "rate"], [["a", "1"], ["long one", "10"]]).splitlines() == [
        "name      rate",
        "──────────────",
        "a            1",
        "long one    10",
    ]


def test_the_machine_names_what_is_missing() -> None:
    described = machine(("pytest", "no-such-distribution"))
    assert described["packages"]["pytest"]
    assert described["packages"]["no-such-distribution"] is None
    assert described["cores"] >= 1
