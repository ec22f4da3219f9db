"""Say what there is to choose from: models, datasets, schemes, ...

python -m jaxpar list
python -m jaxpar list schemes norms
"""

from collections.abc import Sequence
from typing import Annotated

from tyro.conf import Positional, arg

from jaxpar import cli
from jaxpar.core import family
from jaxpar.core.refuse import Problem, near_miss, refuse


def list(argv: Sequence[str]) -> None:
    """Print each family, or those in `argv`, with what each member says of itself; imports no member.

    Raises:
        Refused: for a family that there is not.
    """
    cli.flags(_members, argv, __doc__)


def _members(names: Positional[Annotated[tuple[str, ...], arg(metavar="FAMILY")]] = ()) -> None:
    families = family.families()
    unknown = (name for name in names if name not in families)
    refuse(Problem("family", name, "there is no such family.", near_miss(name, families)) for name in unknown)
    for name in names or families:
        print(f"{name}: {family.said(name)}")
        for member in family.names(name):
            print(f"  {member:<18}{family.said(name, member)}")
