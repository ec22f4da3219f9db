"""Metrics for Weights & Biases: kept in the folder of the run where nobody is logged in; needs wandb."""

import netrc
import os
import secrets
from contextlib import suppress
from pathlib import Path

import wandb as client

from jaxpar.core.types import Sink

ID = "wandb.txt"  # of the run there, so that one which resumes goes on in the same curve


def wandb(folder: Path, recipe: dict, lines: list[dict]) -> Sink:
    """A run of the name of its folder, in the project `jaxpar` or that of WANDB_PROJECT.

    It is sent only where the caller has logged in or set WANDB_MODE, and nobody is ever asked for a key; otherwise
    `wandb sync` sends it later.

    Args:
        folder: of the run.
        recipe: becomes the configuration there.
        lines: those before the checkpoint from which the run goes on; steps that are already there are not sent again.
    """
    path = folder / ID
    if not path.exists():
        path.write_text(secrets.token_hex(8), encoding="ascii")
    run = client.init(
        project=os.environ.get("WANDB_PROJECT", "jaxpar"),
        name=folder.name,
        id=path.read_text(encoding="ascii"),
        resume="allow",
        dir=str(folder),
        config=recipe,
        mode=None if _is_chosen() else "offline",
        save_code=False,
        settings=client.Settings(silent=True, console="off"),
    )
    first = run.step  # that the server still takes

    def write(line: dict) -> None:
        if line["step"] >= first:
            values = {name: value for name, value in line.items() if name != "step" and value is not None}
            run.log(values, step=line["step"])

    return Sink(write, run.finish)


def _is_chosen() -> bool:
    """Whether the caller has said where runs go, or has logged in."""
    hosts = {}
    with suppress(OSError, netrc.NetrcParseError):
        hosts = netrc.netrc().hosts
    return bool({"WANDB_MODE", "WANDB_API_KEY"} & os.environ.keys()) or any("wandb" in host for host in hosts)
