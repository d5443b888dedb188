import argparse
import logging

import pytest

from nl_detectron.engine.command_line import (
    Parser,
    exit_on_user_error,
    message_of,
    positive_int,
    score,
)

MODEL = ["--config-file", "a.yaml"]


@pytest.fixture
def parser():
    parser = Parser("What it does.", "Examples:\n    one\n    two")
    parser.add_model_arguments()
    parser.add_overrides("not for cats")
    return parser


@pytest.mark.parametrize(
    "words",
    [
        [*MODEL, "--weights", "w", "A.B", "-1e-4", "C", "-inf"],
        ["A.B", "-1e-4", *MODEL, "C", "-inf", "--weights", "w"],
        [*MODEL, "A.B", "-1e-4", "--weights=w", "C", "-inf"],
    ],
)
def test_overrides_stand_anywhere_and_may_be_negative(words, parser):
    args = parser.parse_with_overrides(words)
    assert (args.config_file, args.weights) == ("a.yaml", "w")
    assert args.opts == ["A.B", "-1e-4", "C", "-inf"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: --config-file"),
        ([*MODEL, "A"], "overrides come in pairs of KEY VALUE, but got A"),
        ([*MODEL, "A", "--other", "1"], "unrecognized arguments: --other"),
        ([*MODEL, "-1", "A"], "unrecognized arguments: -1"),
    ],
)
def test_errors_are_one_line(words, message, parser, capsys):
    with pytest.raises(SystemExit) as exit_:
        parser.parse_with_overrides(words)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{parser.prog}: error: {message}"


def test_help_keeps_its_lines(parser):
    text = parser.format_help()
    for part in ("What it does.", "KEY VALUE:", "  not for cats\n", "    one\n    two\n"):
        assert part in text


def test_numbers():
    assert (score("0"), score("0.25"), positive_int("12")) == (0, 0.25, 12)
    for convert, text in ((score, "1.1"), (score, "-1"), (score, "x"), (score, "nan")):
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            convert(text)
    for text in ("0", "-1", "1.5", "x", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not"):
            positive_int(text)


@pytest.mark.parametrize(
    ("error", "message"),
    [(KeyError("no key"), "no key"), (KeyError(), ""), (ValueError("'a'"), "'a'")],
)
def test_message_of(error, message):
    assert message_of(error) == message


def test_the_traceback_goes_to_the_log_file_only(tmp_path, monkeypatch, capsys):
    logger = logging.getLogger("nl_detectron")
    with (tmp_path / "log.txt").open("w") as file:
        monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(file)])
        logger.addHandler(logging.StreamHandler())
        with pytest.raises(SystemExit), exit_on_user_error():
            raise KeyError("the key")
    assert capsys.readouterr().err.endswith(": error: the key\n")
    log = (tmp_path / "log.txt").read_text()
    assert log.startswith("the key\nTraceback")
    assert log.endswith("KeyError: 'the key'\n")


def test_only_the_errors_that_are_named():
    @exit_on_user_error((ImportError,))
    def fail(error):
        raise error

    with pytest.raises(SystemExit):
        fail(ImportError())
    for error in (OSError, KeyError, RuntimeError):
        with pytest.raises(error):
            fail(error())
    with pytest.raises(ValueError, match="why"), exit_on_user_error(traceback=True):
        raise ValueError("why")
