import pytest

from trainer.runtime import console


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def test_off_a_terminal_a_loop_is_two_lines_on_stderr(capsys):
    assert list(console.progress(["a", "b", "c"], "reading [x]")) == ["a", "b", "c"]
    assert list(console.progress(2, "steps")) == [0, 1]
    assert list(console.progress(iter("ab"), "stream")) == ["a", "b"]
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 6
    assert lines[0] == "reading [x]: 3 ..." and lines[1].startswith("reading [x]: 3 done in ")
    assert lines[4] == "stream ..." and lines[5].startswith("stream: 2 done")


def test_only_the_main_process_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert list(console.progress(2, "steps")) == [0, 1]
    console.say("hello")
    console.table("t", ["a"], [["b"]])
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    console.say("hello")
    assert capsys.readouterr().out == "hello\n"


def test_lines_are_literal_and_never_wrapped(capsys):
    line = "[bold]x[/bold] " + "word " * 60
    console.say(line)
    assert capsys.readouterr().out.strip() == line.strip()


def test_a_table_off_a_terminal_cuts_nothing(capsys):
    long = "n" * 150
    console.table("figures", ["name", "value"], [[long, 0.5], ["[red]b", 1]])
    out = capsys.readouterr().out
    assert long in out and "[red]b" in out and "0.5" in out
    with pytest.raises(ValueError, match="cells"):
        console.table("figures", ["name", "value"], [["alone"]])


def test_nested_bars_on_a_terminal_share_one_display(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(console.Console, "is_terminal", property(lambda self: True))
    seen = [(a, b) for a in console.progress(2, "outer") for b in console.progress(2, "inner")]
    assert len(seen) == 4 and console._display is None
    with pytest.raises(RuntimeError):
        for _ in console.progress(2, "broken"):
            raise RuntimeError("stop")
    assert console._display is None


def test_what_a_terminal_would_act_upon_is_written_out(capsys):
    console.say("a\x1b[31mred\x1b[0m\x9b\u202eb\nline\x07")
    console.table("t\x1b", ["c\x1b"], [["x\x1b]0;title\x07"]])
    assert list(console.progress(1, "l\x1b[2J")) == [0]
    out, err = capsys.readouterr()
    assert out.startswith("a\\x1b[31mred\\x1b[0m\\x9b\\u202eb\nline\\x07\n") and "\\x1b]0;title\\x07" in out
    assert not set("\x1b\x9b\x07\u202e") & set(out + err)
