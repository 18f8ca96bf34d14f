"""Which queries make cumulative scores: an option of the methods that sum softmax weights over queries."""

ALLOWED = "'all', 'last:W' or 'every:S' with an integer W or S >= 1"


def parse_score_queries(method: str, text: str) -> tuple[int | None, int]:
    """(window, step) of `all`, `last:W` (the prompt's last W queries) or `every:S` (every S-th one).

    Steps count back from the prompt's last query, which is always in. In decode `last:W` takes every query, `every:S`
    every S-th one. Raises ValueError for anything else.
    """
    kind, colon, number = text.partition(":") if isinstance(text, str) else ("", "", "")
    if kind == "all" and not colon:
        return None, 1
    if kind in ("last", "every") and number.isascii() and number.isdecimal() and int(number) >= 1:
        return (int(number), 1) if kind == "last" else (None, int(number))
    raise ValueError(f"{method}: score_queries={text!r}, allowed is {ALLOWED}")


def check_score_queries(method: str, text: str, evict_in_prefill: str) -> None:
    """Raise ValueError unless `parse_score_queries` reads it and it can be observed in time for every cut."""
    window, _ = parse_score_queries(method, text)
    if window is not None and evict_in_prefill == "chunk":
        raise ValueError(
            f"{method}: score_queries={text!r} with evict_in_prefill='chunk': the prompt's last queries come after the "
            "first cuts, allowed are 'all' and 'every:S'"
        )
