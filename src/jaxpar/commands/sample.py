"""Write text by the model of a run, on whatever devices there are.

python -m jaxpar sample train --prompt "def " --count 400
python -m jaxpar sample runs/lm --temperature 0.5 --top-k 20 --step 300
"""

import sys
from collections.abc import Sequence
from typing import Annotated

from tyro.conf import Positional, arg

from jaxpar import cli
from jaxpar.core.refuse import refuse
from jaxpar.train import record


def sample(argv: Sequence[str]) -> None:
    """Print a prompt and what the model of a run makes of it.

    Raises:
        Refused: if the run is none, has no checkpoint or is not of text, or a number is out of range.
    """
    cli.flags(_written, argv, __doc__)


def _written(
    run: Positional[Annotated[str, arg(metavar="RUN", help="name of a run in --runs-dir, or the path of its folder.")]],
    prompt: Annotated[str, arg(help="what the text begins with.")] = "\n",
    count: Annotated[int, arg(help="bytes to add.")] = 400,
    temperature: Annotated[float, arg(help="what logits are divided by.")] = 0.8,
    top_k: Annotated[int | None, arg(help="draw from that many of the likeliest bytes; by default all.")] = None,
    seed: Annotated[int, arg(help="of the draws.")] = 0,
    step: Annotated[int | None, arg(help="of the checkpoint; by default the newest.")] = None,
    runs_dir: Annotated[str, arg(help="folder of all runs.")] = "runs",
) -> None:
    folder = record.find(run, runs_dir)
    from jaxpar.plan import mesh
    from jaxpar.train import cache
    from jaxpar.train import sample as writing

    settings = {"count": count, "temperature": temperature, "top_k": top_k, "seed": seed}
    refuse(writing.wrong(prompt, **settings))
    mesh.simulate(1)
    if warning := cache.use_cache():
        print(f"warning: {warning}", file=sys.stderr)
    print(writing.sample(writing.restored(folder, step), prompt, **settings))
