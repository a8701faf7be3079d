"""What becomes of the codes that one request names."""

from quotepush.push.results import understand


def test_each_spelling_has_one_result_in_the_order_of_the_request() -> None:
    results = understand(["b", "no such", "a", "B"])
    said = results.as_said()
    assert said["accepted"] == [{"as": "b", "code": "B"}, {"as": "a", "code": "A"}, {"as": "B", "code": "B"}]
    assert [(result["as"], result["error"]) for result in said["rejected"]] == [("no such", "bad_code")]
    assert list(results.codes) == ["B", "A"]


def test_spellings_of_a_code_that_is_refused_share_its_fate() -> None:
    results = understand(["600519", "A", "sh600519"])
    results.refuse({"600519.SH": "unknown_code", "NEVER.ASKED": "unknown_code"})
    said = results.as_said()
    assert said["accepted"] == [{"as": "A", "code": "A"}]
    assert [(result["as"], result["error"]) for result in said["rejected"]] == [
        ("600519", "unknown_code"), ("sh600519", "unknown_code"),
    ]  # fmt: skip
    assert all("code" not in result for result in said["rejected"])
    assert list(results.codes) == ["A"]


def test_what_is_noted_of_a_code_is_said_for_each_of_its_spellings() -> None:
    results = understand(["600519", "A", "sh600519"])
    results.note("600519.SH", resume="current")
    assert [result.get("resume") for result in results.as_said()["accepted"]] == ["current", None, "current"]


def test_only_new_codes_need_room() -> None:
    results = understand(["a", "b", "c", "B", "d"], known={"A": None}, most=3)
    assert list(results.codes) == ["A", "B", "C"]
    (rejected,) = results.as_said()["rejected"]
    assert (rejected["as"], rejected["error"], rejected["message"]) == (
        "d", "code_limit", "at most 3 codes on one connection",
    )  # fmt: skip


def test_who_has_more_than_he_may_keeps_it_and_gets_no_more() -> None:
    results = understand(["a", "c"], known={"A", "B"}, most=1)
    assert list(results.codes) == ["A"]
