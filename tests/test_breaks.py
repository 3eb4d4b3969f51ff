"""The breaks of `tools/breaks.py` can be made: a text that is gone, or stands twice, breaks nothing."""

from pathlib import Path


def test_every_break_has_one_place_and_tests_that_are_there(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "tools")
    import breaks

    texts = breaks.sources(breaks.ROOT)
    lost = []
    for broken in breaks.BREAKS:
        try:
            breaks.place_of(broken, texts)
        except LookupError as error:
            lost.append(f"{broken.what}: {error}")
        if not (breaks.ROOT / broken.tests[0]).is_file():
            lost.append(f"{broken.what}: there is no {broken.tests[0]}")
    assert lost == []
