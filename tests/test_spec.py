"""Text that names a member of a family and some of its arguments."""

import pytest

from jaxpar.core import spec


def member(text):
    return spec.member("norms", text, "model.norm", reserved=("dims", "bias"))


@pytest.fixture
def here(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "def own(width, *, decay=0.9, groups=2, centred=True, control='clamp', bias=True):\n"
        "    raise ValueError(f'{width} {decay} {groups} {centred} {control} {bias}')\n"
    )
    return f"{path}:own"


@pytest.mark.parametrize(
    "items, said",
    [
        ("", "8 0.9 2 True clamp True"),
        (":decay=1e-3+groups=4", "8 0.001 4 True clamp True"),
        (":centred=false+control=none", "8 0.9 2 False none True"),
        (":decay=1e+1", "8 10.0 2 True clamp True"),
    ],
)
def test_arguments_are_read_by_the_type_of_their_default(here, items, said):
    with pytest.raises(ValueError, match=said):
        member(here + items)(8)


@pytest.mark.parametrize(
    "items, rules",
    [
        (":dekay=1", ["no `dekay`", "did you mean `decay`"]),
        (":bias=false", ["no `bias`"]),
        (":groups=2.5+centred=yes", ["`groups` must be a whole number", "`centred` must be true or false"]),
        (":decay=a", ["`decay` must be a number"]),
        (":groups=2+groups=3", ["says `groups` twice"]),
        (":7", ["`7` is not NAME=VALUE"]),
    ],
)
def test_every_wrong_argument_is_named(here, items, rules):
    with pytest.raises(ValueError) as refused:
        member(here + items)
    for rule in rules:
        assert rule in str(refused.value)
    assert "model.norm" in str(refused.value)
