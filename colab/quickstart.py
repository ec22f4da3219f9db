# %% [markdown]
# # jaxpar in ten minutes
#
# A model is written once, as pure functions. A *plan* says by name how it is laid out over devices. The numbers stay
# the same, and jaxpar tells exactly which bytes each device sends.
#
# On Colab choose a runtime first (Runtime > Change runtime type; a TPU or GPU makes the training faster, and none is
# needed), then Runtime > Run all.

# %%
# Install jaxpar, unless it is here, with the driver that fits the chip of this machine; this takes a minute.
import importlib.metadata
import importlib.util
import pathlib
import re
import subprocess
import sys

TPUS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}  # as the PCI bus names v3 to v7x
cards = [path for path in pathlib.Path("/sys/bus/pci/devices").glob("*") if "0x1ae0" in (path / "vendor").read_text()]
devices = {(path / "device").read_text().strip() for path in cards}
driver = pathlib.Path("/proc/driver/nvidia/version")
nvidia = re.search(r"(\d+)\.\d+", driver.read_text()) if driver.exists() else None
extra = "[tpu]" if devices & TPUS else f"[cuda{13 if int(nvidia[1]) >= 580 else 12}]" if nvidia else ""
if importlib.util.find_spec("jaxpar") is None:
    source = ["--editable", f"..{extra}"] if pathlib.Path("../src/jaxpar").is_dir() else [f"jaxpar{extra}"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *source], check=True)
loaded = [name for name in ("jax", "jaxlib", "numpy", "flax", "optax") if name in sys.modules]
stale = [name for name in loaded if sys.modules[name].__version__ != importlib.metadata.version(name)]
print(f"Restart now (Runtime > Restart session): {', '.join(stale)} changed." if stale else "No restart is needed.")

# %% [markdown]
# ## What is here
#
# Devices are made when jax is first asked for them, and not again. So before that we ask for eight simulated CPU
# devices beside whatever accelerator there is. `doctor` looks at everything that jaxpar stands on, and prints one line
# for each problem that mends it.

# %%
import jaxpar

jaxpar.simulate(8)
jaxpar.doctor()

# %% [markdown]
# ## Train
#
# A *recipe* holds every choice of a run as plain values. This one is a small GPT on the bytes of Python's own standard
# library, which is here on every machine. The plan is left out, so one device does all the work: the accelerator, if
# there is one.

# %%
from jaxpar import Data, Model, Recipe, fit

recipe = Recipe(
    model=Model("gpt", layers=2, width=64, heads=4, context=64),
    data=Data("stdlib_text"),
    batch=16,
    steps=300,
    learning_rate=6e-3,
    evaluate_every=100,
    evaluate_batches=16,
)
run = fit(recipe)

# %% [markdown]
# The loss is in nats per byte. A model that knows nothing scores ln 256 = 5.55, and one that knows only how often each
# byte occurs scores the dashed line.

# %%
import tempfile

import numpy as np
from IPython.display import Image

from jaxpar import losses_picture

train, held_out = run.dataset.splits
share = (np.bincount(train, minlength=256) + 1) / (len(train) + 256)
levels = {"bytes counted": -np.log(share[held_out]).mean()}
png = pathlib.Path(tempfile.mkdtemp(), "loss.png")
Image(losses_picture(png, run.losses, run.held_out, levels, "gpt on stdlib_text").read_bytes(), width=640)

# %% [markdown]
# It writes something that looks like Python from afar. Each byte is drawn from the 40 likeliest.

# %%
from jaxpar import sample

print(sample(run, "def ", count=300, top_k=40))

# %% [markdown]
# ## The same recipe on eight devices
#
# The plan `tensor=two_half_d:2x2x2` lays every weight out over a 2 x 2 mesh, twice, and splits the batch over the two
# copies. Nothing else changes: not the model, not the initial parameters, not one batch. We take fewer steps, since
# eight devices that are simulated on a few cores are slow; real ones are why one does this.

# %%
from dataclasses import replace

from jaxpar import Plan, table

short = replace(recipe, steps=30, evaluate_every=0)
alone = fit(short)
together = fit(replace(short, plan=Plan.parse("tensor=two_half_d:2x2x2")))

# %% [markdown]
# The losses are those of one device, up to rounding. (A TPU rounds the factors of a product to bfloat16 where a CPU
# does not; there the two agree to about three digits.)

# %%
print("step   one device   eight devices")
for step in (1, 10, 20, 30):
    print(f"{step:4}   {alone.losses[step - 1]:10.6f}   {together.losses[step - 1]:13.6f}")
difference = max(abs(one - eight) for one, eight in zip(alone.losses, together.losses, strict=True))
print(f"largest difference in {short.steps} steps: {difference:.1e} nats")

# %% [markdown]
# And this is the bill of one step: what each device sends, predicted from the layouts before anything was compiled, and
# then counted in the compiled program. On simulated devices seconds mean nothing, but bytes are bytes.

# %%
print(table(together.bill))

# %% [markdown]
# Other plans to try: `data=8`, `tensor=one_d:8`, `tensor=fsdp:8`, `tensor=two_d:2x4`, `tensor=three_d:2x2x2`, or
# `data=2,tensor=sequence:4`. Those that cannot work are refused with the reason and what to write instead.

# %%
try:
    fit(replace(short, plan=Plan.parse("tensor=one_d:3")))
except jaxpar.Refused as refused:
    print(refused)
