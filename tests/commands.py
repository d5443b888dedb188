"""What the tests of commands share."""

import pytest


def error_of(capsys, main, *words):
    """The one line on stderr of a command that ends with an error of the user."""
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line
