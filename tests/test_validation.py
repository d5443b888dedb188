import pytest

from nl_detectron.validation import check_choice, did_you_mean


@pytest.mark.parametrize("value", ["res4", "res5"])
def test_legal(value):
    check_choice("stage", value, ["res4", "res5"])


@pytest.mark.parametrize("value", ["res6", "RES4", "", None, 4, True])
def test_illegal(value):
    with pytest.raises(ValueError, match=r"stage is .* but must be one of 'res4', 'res5', 1") as e:
        check_choice("stage", value, ["res4", "res5", 1])
    assert repr(value) in str(e.value)


def test_nearest():
    assert did_you_mean("rse4", ["res4", "head"]) == "; did you mean 'res4'?"
    assert did_you_mean("backbone", ["res4", "head"]) == ""
