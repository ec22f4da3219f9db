"""Programs over several CPU devices that jax reads back from its compile cache: do they still work?

    python tests/xla_cache.py     expect, of jaxlib 0.10.2: all "right" but `loop`, warm; half a minute

It needs jax alone. Each program has collectives that do not depend on each other's values; `loop` has some of them in a
`while`, `unrolled` has the same without. XLA orders all collectives of a CPU program by a resource that they share; it
must, since shard_map gives all of them one channel. In what it writes down (`ThunkSequenceProto`) each nested sequence
has a resource of its own, so that in the program that is read back the loop is ordered after nothing. When this prints
"right" four times, `jaxpar.core.compat.no_compile_cache` can go.
"""

import os
import subprocess
import sys
import tempfile

PROGRAM = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P

mesh, both = jax.make_mesh((2, 4), ("r", "c"), axis_types=(AxisType.Auto,) * 2), P(("r", "c"))

def there_and_back(x, axis):
    return jax.lax.psum_scatter(jnp.cos(jax.lax.all_gather(x, axis, tiled=True)), axis, tiled=True)

def local(x, ys):
    if sys.argv[1] == "loop":
        x, _ = jax.lax.scan(lambda x, _: (there_and_back(x, "c"), None), x, None, length=4)
    else:
        for _ in range(4):
            x = there_and_back(x, "c")
    return x, [there_and_back(jnp.cos(y @ y), "rc"[i % 2]) for i, y in enumerate(ys)]

program = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=both, out_specs=both, check_vma=False))
x, *ys = np.random.default_rng(0).normal(size=(17, 512, 64)).astype(np.float32)
first = jax.device_get(program(x, ys))
for _ in range(60):
    same = jax.tree.map(np.array_equal, jax.device_get(program(x, ys)), first)
    assert all(jax.tree.leaves(same)), "other numbers than the first time"
"""


def main() -> None:
    """Run both programs twice, in a process each."""
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=10"
    for kind in ("unrolled", "loop"):
        with tempfile.TemporaryDirectory() as folder:
            env = os.environ | {"XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": folder, "JAX_PLATFORMS": "cpu"}
            env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            for when in ("cold", "warm"):
                found = subprocess.run([sys.executable, "-c", PROGRAM, kind], env=env, capture_output=True, text=True)
                wrong = f"wrong, exit code {found.returncode}" + " and a rendezvous stuck" * ("stuck" in found.stderr)
                print(f"{kind:<10}{when}: {wrong if found.returncode else 'right'}", flush=True)


if __name__ == "__main__":
    main()
