"""Small programs whose FLOPs and bytes are known by hand, and the devices to compile them for.

Run as a program it writes the HLO of libtpu again (tests/golden/hlo), without what the counter does not read.
"""

import functools
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from insec_jax.sizing import hardware
from insec_jax.sizing.hardware import Topology

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "hlo"


def tpu(name: str) -> Topology:
  """A described slice; the test is skipped where the compiler is missing."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed (pip install 'insec_jax[tpu]')")
  requests = hardware.parse(name)
  hardware.prepare(requests)
  return hardware.describe(requests[0])


def mesh_of(devices, **axes: int) -> Mesh:
  """The first devices as a mesh of these axes."""
  number = int(np.prod(list(axes.values())))
  return Mesh(np.array(devices[:number]).reshape(tuple(axes.values())), tuple(axes))


def text_of(function, mesh: Mesh, *arguments) -> str:
  """The optimised HLO; an argument is (shape, dtype, axes of the mesh for each dimension)."""
  structs = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(*axes)))
    for shape, dtype, axes in arguments
  ]
  return jax.jit(function).lower(*structs).compile().as_text()


M, D, L, OUTER = 128, 256, 7, 5


def scan(devices) -> str:
  """L products [M, D] x [D, D] in a scan."""

  def function(x_MD, w_LDD):
    return jax.lax.scan(lambda x_MD, w_DD: (jnp.tanh(x_MD @ w_DD), None), x_MD, w_LDD)[0]

  return text_of(function, mesh_of(devices, one=1), ((M, D), jnp.bfloat16, ()), ((L, D, D), jnp.bfloat16, ()))


def nested_scan(devices) -> str:
  """The same, OUTER times over."""

  def function(x_MD, w_LDD):
    def once(x_MD, _):
      return jax.lax.scan(lambda x_MD, w_DD: (jnp.tanh(x_MD @ w_DD), None), x_MD, w_LDD)[0], None

    return jax.lax.scan(once, x_MD, length=OUTER)[0]

  return text_of(function, mesh_of(devices, one=1), ((M, D), jnp.bfloat16, ()), ((L, D, D), jnp.bfloat16, ()))


def triangle(devices) -> str:
  """L + (L - 1) + .. + 1 products: the inner loop is as long as the counter of the outer one says."""

  def function(x_MD, w_DD):
    def once(number, x_MD):
      return jax.lax.fori_loop(0, L - number, lambda _, x_MD: jnp.tanh(x_MD @ w_DD), x_MD)

    return jax.lax.fori_loop(0, L, once, x_MD)

  return text_of(function, mesh_of(devices, one=1), ((M, D), jnp.bfloat16, ()), ((D, D), jnp.bfloat16, ()))


def as_the_data_says(devices) -> str:
  """As many products as there are trained tokens."""

  def function(x_MD, w_DD, weight_M):
    with jax.named_scope("trained_chunks"):
      return jax.lax.fori_loop(0, (weight_M != 0).sum(), lambda _, x_MD: jnp.tanh(x_MD @ w_DD), x_MD)

  return text_of(
    function, mesh_of(devices, one=1), ((M, D), jnp.bfloat16, ()), ((D, D), jnp.bfloat16, ()), ((M,), jnp.int32, ())
  )


BATCH = 6


def batched(devices) -> str:
  """BATCH products [M, D] x [D, D], and a product that contracts two dimensions, BATCH and M."""

  def function(x_BMD, w_BDD):
    y_BMD = jnp.einsum("bmd,bde->bme", x_BMD, w_BDD)
    return jnp.tanh(y_BMD), jnp.einsum("bmd,bme->de", x_BMD, y_BMD)

  return text_of(
    function, mesh_of(devices, one=1), ((BATCH, M, D), jnp.bfloat16, ()), ((BATCH, D, D), jnp.bfloat16, ())
  )


LAYERS, WIDTH, HIDDEN, TOKENS = 4, 2048, 4096, 4096  # TOKENS of a device


def fsdp(devices, *, x: int, y: int, compute=jnp.bfloat16) -> str:
  """Gradient of LAYERS blocks of two products, recomputed; weights split over x * y devices and gathered twice."""
  mesh = mesh_of(devices, x=x, y=y)

  def gather(w):
    for axis in ("y", "x"):
      w = jax.lax.all_gather(w, axis, tiled=True)
    return w

  def loss(up_LDF, down_LDF, x_MD):
    def layer(x_MD, weights):
      up_DF, down_DF = map(gather, weights)
      return x_MD + jnp.tanh(x_MD @ up_DF) @ down_DF.T, None

    x_MD, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x_MD, (up_LDF, down_LDF))
    return (x_MD.astype(jnp.float32) ** 2).sum()

  split, rows = jax.P(None, ("x", "y")), jax.P(("x", "y"))

  @functools.partial(jax.shard_map, mesh=mesh, in_specs=(split, split, rows), out_specs=(split, split), check_vma=False)
  def gradient(up_LDF, down_LDF, x_MD):
    cast = (up_LDF.astype(compute), down_LDF.astype(compute))
    return jax.grad(loss, argnums=(0, 1))(*cast, x_MD)

  weight = ((LAYERS, WIDTH, HIDDEN), jnp.float32, (None, ("x", "y")))
  return text_of(gradient, mesh, weight, weight, ((x * y * TOKENS, WIDTH), compute, (("x", "y"),)))


def two_slices(devices) -> str:
  """A gradient scattered in each of two slices of 4 chips, then summed between them."""
  mesh = mesh_of(devices, data=2, fsdp=4)

  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(jax.P("fsdp"), jax.P(("data", "fsdp"))),
    out_specs=jax.P("fsdp"),
    check_vma=False,
  )
  def gradient(w_DD, x_MD):
    def loss(w_DD):
      return (jnp.tanh(x_MD @ jax.lax.all_gather(w_DD, "fsdp", tiled=True)).astype(jnp.float32) ** 2).sum()

    return jax.lax.psum(jax.grad(loss)(w_DD), "data")

  return text_of(
    gradient, mesh, ((WIDTH, WIDTH), jnp.bfloat16, ("fsdp",)), ((64, WIDTH), jnp.bfloat16, (("data", "fsdp"),))
  )


HEADS, ROW = 2, 256


def splash(devices) -> str:
  """Gradient of splash attention, three kernels, and one product beside them."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

  causal = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((ROW, ROW))] * HEADS)
  kernel = splash_attention_kernel.make_splash_mha_single_device(causal)

  def loss(q_NTH, k_NTH, v_NTH, w_HH):
    return (kernel(q_NTH, k_NTH, v_NTH) @ w_HH).astype(jnp.float32).sum()

  heads = ((HEADS, ROW, 128), jnp.bfloat16, ())
  return text_of(
    jax.grad(loss, argnums=(0, 1, 2)), mesh_of(devices, one=1), heads, heads, heads, ((128, 128), jnp.bfloat16, ())
  )


STORED = {
  "v5e_nested_scan": ("v5e:1x1", nested_scan),
  "v5e_batched": ("v5e:1x1", batched),
  "v5e_fsdp": ("v5e:4x4", functools.partial(fsdp, x=4, y=4)),
  "tpu7x_fsdp": ("tpu7x:2x2x1", functools.partial(fsdp, x=2, y=4)),
  "v5e_two_slices": ("2xv5e:2x2", two_slices),
  "v5e_splash": ("v5e:1x1", splash),
}


def shortened(text: str) -> str:
  """The HLO without tables of sources, addresses of stack frames, and the backend's configuration."""
  text = re.sub(r"\n\nFileNames\n.*?(?=\n\n\n)", "", text, flags=re.DOTALL)
  text = re.sub(r" stack_frame_id=\d+", "", text)
  # To the end of the line: nothing follows it but, at a kernel, what closes its brackets.
  return re.sub(r", backend_config=\{.*", "", text)


if __name__ == "__main__":
  GOLDEN.mkdir(exist_ok=True)
  for stored, (slice_name, program) in STORED.items():
    (GOLDEN / f"{stored}.txt").write_text(shortened(program(tpu(slice_name).devices)))
