"""What the command lines of the scripts share."""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from detectron2.config import defaults

from nl_detectron.project import use_project

USER_ERRORS = (OSError, ValueError, KeyError)
"""What checks of files, values and config keys raise."""


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one line, and which keeps the lines of its texts."""

    _takes_words = False

    def __init__(self, description: str | None, epilog: str | None = None) -> None:
        super().__init__(
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument(
            "--project",
            action="append",
            default=[],
            type=_project,
            metavar="MODULE",
            help="a module or file of another project, imported first, and its config keys taken; "
            "any number",
        )

    def add_model_arguments(
        self, weights: str = "its weights (default: MODEL.WEIGHTS)", *, or_run: bool = False
    ) -> None:
        """Add ``--config-file``, which is required, and ``--weights`` with its help; or with
        ``or_run`` also RUN and IMAGES, which stand anywhere: the words that are no options and no
        overrides."""
        if or_run:
            self._takes_words = True
            self.usage = "%(prog)s [RUN] [IMAGE ...] [options] [KEY VALUE ...]"
            self.add_argument_group(
                "RUN", "the OUTPUT_DIR of train_net.py, or a checkpoint in it; IMAGEs follow"
            )
            text = "config of a model, if that is in no RUN"
        else:
            text = "config of a model"
        self.add_argument("--config-file", metavar="FILE", required=not or_run, help=text)
        self.add_argument("--weights", metavar="FILE", help=weights)

    def add_overrides(self, note: str = "") -> None:
        """Describe the overrides, which :meth:`parse_with_overrides` accepts, in the help."""
        text = "config keys and their values, such as SOLVER.BASE_LR 0.01, among the options"
        self.add_argument_group("KEY VALUE", f"{text}\n{note}")

    def add_overwrite(self) -> None:
        """Add ``--overwrite``, for :func:`nl_detectron.files.check_target`."""
        self.add_argument(
            "--overwrite", action="store_true", help="replace what is there; else it is an error"
        )

    def parse_with_overrides(self, words: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse a command line on which ``KEY VALUE`` pairs may stand before, between and after the
        options; they are in ``opts``, keys and values in turn. A value may be a negative number,
        such as -1e-4. An unknown option, or a key without a value, ends the process with exit
        status 2. ``run`` and ``images`` are what :meth:`add_model_arguments` has added."""
        args, overrides = self.parse_known_args(words)
        if self._takes_words:
            args.images, overrides = _without_overrides(overrides)
            args.run = args.images.pop(0) if args.images and not args.config_file else None
        # No key begins with a dash. A value may, but not with two.
        unknown = [
            word for i, word in enumerate(overrides) if word.startswith("--" if i % 2 else "-")
        ]
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        if len(overrides) % 2:
            self.error(f"overrides come in pairs of KEY VALUE, but got {' '.join(overrides)}")
        args.opts = overrides
        return args

    def error(self, message: str) -> NoReturn:
        """End with exit status 2, as ``ArgumentParser.error`` does, but without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _without_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Other words, and those of KEY VALUE: keys are in a node of the config, or at its top."""
    others, overrides, rest = [], [], iter(words)
    for word in rest:
        if word.startswith("-") or word.partition(".")[0] in defaults._C:
            overrides += [word, *itertools.islice(rest, not word.startswith("-"))]
        else:
            others.append(word)
    return others, overrides


def _project(text: str) -> str:
    try:
        use_project(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def score(text: str) -> float:
    """Read a confidence, from 0 to 1, from the command line."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def positive_int(text: str) -> int:
    """Read a number of things, at least 1, from the command line."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


@contextmanager
def exit_on_user_error(
    errors: tuple[type[Exception], ...] = USER_ERRORS, *, traceback: bool = False
) -> Iterator[None]:
    """Let errors of the user end the process with one line on stderr and exit status 2; with
    ``traceback`` they pass, as all others do. Where they arose is written to the log files of the
    run, if it has some already. A context manager, or with ``@`` a decorator."""
    try:
        yield
    except errors as error:
        if traceback:
            raise
        message = message_of(error)
        _log_to_files(message)
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {message}\n")
        raise SystemExit(2) from error


def message_of(error: Exception) -> str:
    """Return what an error says, without the quotes that KeyError puts around it."""
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


def _log_to_files(message: str) -> None:
    """Log the error that is being handled, with its traceback, but not on the screen."""
    logger = logging.getLogger("nl_detectron")
    record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, message, (), sys.exc_info())
    for handler in logger.handlers:
        # Detectron2 logs to files by StreamHandlers, too; the name of a screen is no file's.
        if Path(str(getattr(getattr(handler, "stream", None), "name", ""))).is_file():
            handler.handle(record)
