"""A job's log: numbers go on exactly where a reader was, whatever was killed while it wrote."""

from __future__ import annotations

from pathlib import Path

from mechmerge.service.log import CHUNK, LogWriter, Progress, progress_of, read_events, write_event


def test_reading_on_from_every_number(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert read_events(path) == ([], 0)
    for number in range(20):
        write_event(path, 1, "note", f"note {number} ä")
    found, end = read_events(path)
    assert [event.text for _, event in found] == [f"note {number} ä" for number in range(20)]
    assert end == found[-1].number == path.stat().st_size
    for place, (number, _) in enumerate(found):
        assert read_events(path, number)[0] == found[place + 1 :]
        # A number in the middle of a line counts as the one before.
        assert read_events(path, number - 1)[0] == found[place:]
    assert read_events(path, end + 1000) == ([], end)
    assert read_events(path, -5)[0] == found


def test_a_line_that_a_killed_writer_left_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write_event(path, 1, "note", "first")
    with path.open("ab") as handle:
        handle.write(b'{"type":"note","time":1,"att')
    found, end = read_events(path)
    assert [event.text for _, event in found] == ["first"]
    write_event(path, 2, "note", "second")
    assert [event.text for _, event in read_events(path, end)[0]] == ["second"]
    assert [event.text for _, event in read_events(path)[0]] == ["first", "second"]


def test_long_logs_are_read_in_pieces_that_fit_together(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    writer = LogWriter(path, 1)
    for number in range(3000):
        writer.write("note", f"{number} " + "x" * 50)
    writer.close()
    assert path.stat().st_size > 4 * CHUNK
    texts, position = [], 0
    while True:
        found, after = read_events(path, position)
        if after == position:
            break
        texts += [event.text.split()[0] for _, event in found]
        position = after
    assert texts == [str(number) for number in range(3000)]


def test_an_event_is_one_printable_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write_event(path, 1, "error", "a\n\tb \x1b[31m" + "y" * 5000)
    text = read_events(path)[0][0].event.text
    assert text.startswith("a b \N{REPLACEMENT CHARACTER}[31my")
    assert len(text) == 2000


def test_where_a_job_is(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert progress_of(path) == Progress()
    writer = LogWriter(path, 1)
    writer.stage = "effects"
    writer.write("stage", "begins")
    assert progress_of(path).model_dump(exclude={"time"}) == {"stage": "effects", "step": None, "done": None, "total": None}
    writer.write("step", "loss", 0, 8)
    writer.write("progress", "loss", 3, 8)
    writer.write("note", "a note")
    assert progress_of(path).model_dump(exclude={"time"}) == {"stage": "effects", "step": "loss", "done": 3, "total": 8}
    writer.stage = "merge"
    writer.write("stage", "begins")
    assert progress_of(path).step is None, "the step was another stage's"
    for _ in range(200):
        writer.write("note", "z" * 100)
    assert progress_of(path).stage == "merge"
    writer.close()
