"""`coala chat` by its standard input and on a terminal: commands, comparison, scores."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from coala.alignment import load_parts
from coala.alignment.talking import Talker
from coala.cli import app as cli
from coala.cli.chat import COMMANDS, _Talk
from coala.cli.terminal import visible
from coala.decoding import generate
from coala.export.rewards import score_replies
from coala.values import Turn, user

from .waiting import PATIENCE


@pytest.fixture(scope="module")
def parts(served_run: Path) -> Any:
    return load_parts(served_run)


def talk(run: Path, *lines: str, options: tuple[str, ...] = ()) -> tuple[list[str], str]:
    """What was said to these lines: stdout by lines, and stderr."""
    done = CliRunner().invoke(cli, ["chat", str(run), "--max-new-tokens", "8", *options], input="\n".join(lines) + "\n")
    assert done.exit_code == 0, done.stderr
    return done.stdout.split("\n"), done.stderr


def test_replies_strength_and_conversation(served_run: Path, parts: Any) -> None:
    backbone, head, guidance = parts
    out, err = talk(served_run, "hello", "/strength 7", "and then", "/new", "/guide off", "hello", "/seed 3", "hello")
    first = generate([user("hello")], backbone, head, guidance, max_new_tokens=8, seed=0)[0].text
    turns = [Turn("user", "hello"), Turn("assistant", first), Turn("user", "and then")]
    strong = replace(guidance, strength=7.0)
    second = generate([turns], backbone, head, strong, max_new_tokens=8, seed=1)[0].text
    plain = replace(guidance, mode="none")
    third = generate([user("hello")], backbone, head, plain, max_new_tokens=8, seed=2)[0].text
    turns = [Turn("user", "hello"), Turn("assistant", third), Turn("user", "hello")]
    fourth = generate([turns], backbone, head, plain, max_new_tokens=8, seed=3)[0].text
    assert "\n".join(out).startswith(visible("\n".join((first, second, third, fourth))))
    assert json.loads(out[-2]) == {"replies": 4}
    assert "could not" not in err


def test_compare_shows_both_and_goes_on_with_the_guided_one(served_run: Path, parts: Any) -> None:
    backbone, head, guidance = parts
    options = ("--strength", "20")
    out, err = talk(served_run, "/compare", "hello", "/score", "/compare", "hello", options=options)
    strong = replace(guidance, strength=20.0)
    both = [
        generate([user("hello")], backbone, head, g, max_new_tokens=8, seed=0)[0].text
        for g in (replace(guidance, mode="none"), strong)
    ]
    assert both[0] != both[1]
    assert out[0].split(" | ") == [f"{'unguided':<48}", "guided"]
    for column, text in enumerate(both):
        shown = "".join(line.split(" | ")[column] for line in out[2:] if " | " in line)
        assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", visible(text))
    wanted = float(score_replies([user("hello")], [both[1]], head, backbone)[0])
    (told,) = (line for line in out if line.startswith("score "))
    assert float(told.split()[1]) == pytest.approx(wanted, abs=2e-4)
    assert "compare is on" in err
    assert "compare is off" in err
    assert json.loads(out[-2]) == {"replies": 2}


def test_scores_after_every_token(served_run: Path, parts: Any) -> None:
    backbone, head, guidance = parts
    out, _ = talk(served_run, "/score", "hello", "/score")
    reply = generate([user("hello")], backbone, head, guidance, max_new_tokens=8, seed=0)[0].text
    at = next(i for i, line in enumerate(out) if line.startswith("score "))
    each = [float(one) for one in out[at + 1].split()]
    assert len(each) == len(backbone.render(user("hello"), reply).tokens) - len(backbone.render(user("hello")).tokens)
    assert each[-1] == pytest.approx(float(out[at].split()[1]), abs=0.01)
    low, high = re.findall(r"-?\d+\.\d+", out[at + 2])
    assert (float(low), float(high)) == pytest.approx((min(each), max(each)), abs=0.01)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/help", COMMANDS),
        ("/dance", "/dance: unknown command; /help lists them."),
        ("/", "/: unknown command"),
        ("/strength", "could not convert ''"),
        ("/strength much", "could not convert 'much'"),
        ("/strength nan", "Guidance strength is nan"),
        ("/strength -2", "Guidance strength is -2.0"),
        ("/seed -1", "expected a whole number"),
        ("/seed \u00b2", "expected a whole number"),
        ("/guide perhaps", "expected on or off"),
        ("/score", "there is no reply yet"),
        ("/new now", "unknown command"),
        ("/retry", "there is no reply yet"),
        ("/retry now", "unknown command"),
        ("/temperature -1", "temperature is -1.0"),
        ("/temperature inf", "temperature is inf"),
        ("/temperature warm", "could not convert 'warm'"),
    ],
)
def test_commands_that_do_not_fit_are_told_and_change_nothing(
    served_run: Path, parts: Any, line: str, said: str
) -> None:
    out, err = talk(served_run, line, "hello")
    backbone, head, guidance = parts
    assert said in err
    reply = generate([user("hello")], backbone, head, guidance, max_new_tokens=8, seed=0)[0].text
    assert "\n".join(out).startswith(visible(reply))
    assert json.loads(out[-2]) == {"replies": 1}


def test_system_temperature_and_another_try(served_run: Path, parts: Any) -> None:
    backbone, head, guidance = parts
    lines = ("hello", "/retry", "/system be kind", "/temperature 0", "and then", "/system", "/strength 3")
    out, err = talk(served_run, *lines, options=("--system", "be brief", "--temperature", "0.5"))
    said = [Turn("system", "be brief"), Turn("user", "hello")]
    first, second = (
        generate([said], backbone, head, guidance, max_new_tokens=8, seed=seed, temperature=0.5)[0].text
        for seed in (0, 1)
    )
    asked = [Turn("system", "be kind"), said[1], Turn("assistant", second), Turn("user", "and then")]
    third = generate([asked], backbone, head, guidance, max_new_tokens=8, seed=2, temperature=0.0)[0].text
    assert "\n".join(out).startswith(visible("\n".join((first, second, third))))
    for told in (
        "sampling: temperature 0.5 (as asked), top-p 0.9 (default)",
        "system prompt set",
        "no system prompt",
        "temperature is 0",
        "strength is 3: token, calibrated 3",
    ):
        assert told in err


def test_ctrl_c_stops_the_reply_and_keeps_what_was_written(
    parts: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone, head, guidance = parts
    whole = generate([user("hello")], backbone, head, guidance, max_new_tokens=40, seed=0)[0].text
    chat = _Talk(Talker(backbone, head, guidance, 1.0), 40, 0, guided=True)

    class Interrupting(io.StringIO):
        """A terminal at which somebody presses Ctrl-C when the third piece of a reply appears."""

        pieces = 0

        def write(self, text: str) -> int:
            written = super().write(text)
            self.pieces += 1
            if self.pieces == 3:
                signal.raise_signal(signal.SIGINT)
            return written

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Interrupting())
        assert chat.answer("hello")
    assert chat.interrupted
    assert "stopped; the text so far is kept" in capsys.readouterr().err
    kept = chat.turns[-1]
    assert kept.role == "assistant"
    assert kept.text
    assert whole.startswith(kept.text)
    assert len(kept.text) < len(whole)
    # Where nothing is shown yet, the message is taken back too.
    chat.compare = True
    with monkeypatch.context() as patched:
        patched.setattr("coala.decoding.generate", _interrupted)
        assert not chat.answer("more")
    assert chat.turns[-1] is kept


def _interrupted(*_: Any, **__: Any) -> Any:
    signal.raise_signal(signal.SIGINT)


def test_a_conversation_that_is_too_long_is_refused_or_cut(served_run: Path, parts: Any) -> None:
    backbone = parts[0]
    long = "a film " * backbone.max_tokens
    _, err = talk(served_run, long)
    assert "context_length: the prompt has" in err
    assert "Start over with /new" in err
    _, err = talk(served_run, long, options=("--cut",))
    assert "tokens are truncated" in err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_on_a_terminal_tokens_have_colours(served_run: Path, parts: Any) -> None:
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}
        environment.pop("NO_COLOR", None)
        words = [sys.executable, "-m", "coala", "chat", str(served_run), "--max-new-tokens", "6"]
        os.execve(sys.executable, words, environment)
    shown = b""

    def until(text: bytes) -> None:
        nonlocal shown
        while text not in shown:
            assert select.select([terminal], [], [], PATIENCE)[0], shown
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # the other side has ended
                break
        assert text in shown, shown

    until(b"you> ")
    os.write(terminal, b"hello\n")
    while shown.count(b"you> ") < 2:
        until(b"you> ")
        shown += os.read(terminal, 65536)
    os.write(terminal, b"/score\n")
    until(b"after each token")
    os.write(terminal, b"/quit\n")
    os.waitpid(pid, 0)
    assert b'"replies"' not in shown, "JSON is for pipes"
    backbone, head, guidance = parts
    reply = generate([user("hello")], backbone, head, guidance, max_new_tokens=6, seed=0)[0].text
    coloured = re.findall(r"\x1b\[48;5;(\d+);38;5;\d+m(.*?)\x1b\[0m", shown.decode(errors="replace"), re.S)
    printable = "".join(c for c in reply if c.isprintable())
    assert "".join(text for _, text in coloured).replace("\ufffd", "") == printable.replace("\ufffd", "")
    assert len({ground for ground, _ in coloured}) > 1
