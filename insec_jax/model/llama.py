"""Llama 3 decoder.

Letters that end array names and fill every einsum:
  B row of the batch   T position that reads   S position that is read   L layer   V token of the vocabulary
  D width of the stream   F width of the MLP   N query head   K key head   G = N // K   H width of a head   R role

The stream is the residual stream. The arithmetic is written once, in functions of plain arrays. Training calls them
through the Linen modules at the end of the file, which declare the weights, scan the layers and choose what the
backward pass keeps. Generation calls them in `forward_prompt`, which returns keys and values for a cache, and in
`forward_cached`, which reads and extends the cache.

Functions of sharding.py do nothing without a mesh, except that `look_up` reads the embedding. With one, on each device:
  whole, gather   concatenate a device's shards of a weight (along fsdp) or of an array
  enter, leave    bracket the device's part of heads or of MLP width; `leave` sums over tensor, `enter` the gradients
Implementations of attention are pairs (attention.py): prepare(segment_BT[, until_BT]) -> mask, once for all layers,
and attend(q, k, v, mask) -> context.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from insec_jax.command import InputError
from insec_jax.model import casting, memory, products, sharding
from insec_jax.model import lora as lora_lib
from insec_jax.model import rope as rope_lib
from insec_jax.model.attention import XLA, Attention, as_cached, attend_slots, slot_axes
from insec_jax.model.rope import RopeScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
  """Shape and arithmetic of a model, and other fields of its config.json (hf_config.py reads and writes it)."""

  vocab_size: int
  width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_width: int
  mlp_width: int
  norm_eps: float
  rope_theta: float
  rope_scaling: RopeScaling | None
  tied: bool
  init_std: float | None  # of random weights; None: not in the file
  # No logit depends on the fields below.
  max_positions: int
  bos_id: int | None
  eos_ids: tuple[int, ...]
  pad_id: int | None
  stored_dtype: str | None
  source: str  # config.json as read, for a faithful export

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise InputError(
        f"num_attention_heads={self.num_heads} is not a multiple of num_key_value_heads="
        f"{self.num_kv_heads}; each key head serves the same number of query heads"
      )
    if self.head_width % 2:
      raise InputError(f"head_dim={self.head_width} is odd; rotary positions turn pairs, so it must be even")

  def size(self, letter: str) -> int:
    """Return the length of a weight's axis by its letter."""
    return {
      "V": self.vocab_size,
      "D": self.width,
      "L": self.num_layers,
      "N": self.num_heads,
      "K": self.num_kv_heads,
      "H": self.head_width,
      "F": self.mlp_width,
    }[letter]


# Every weight and its axes; those under "layers" have a leading axis L.
WEIGHTS = {
  "embed": "VD",
  "layers": {
    "attn": {"norm": "D", "wq": "DNH", "wk": "DKH", "wv": "DKH", "wo": "NHD"},
    "mlp": {"norm": "D", "gate": "DF", "up": "DF", "down": "FD"},
  },
  "norm": "D",
  "head": "VD",  # absent when tied: 3.2-1B reads its output matrix from the embedding, 3.1-8B has its own
}
AXES = {"V": "vocab", "D": "width", "L": "layers", "N": "heads", "K": "kv_heads", "H": "head_width", "F": "mlp_width"}
AXES |= {"P": "rank", "M": "markers"}  # of adapters and trained rows (lora.py)


def dot(letters: str, x, weight):
  """Return the einsum in the dtype of `x`; float32 is multiplied in float32, also on TPU (its default is bfloat16)."""
  if isinstance(weight, lora_lib.Adapted):
    return lora_lib.product(products.einsum, letters, x, weight)
  return (products.widening if letters == "BTD,DF->BTF" else products.einsum)(letters, x, weight.astype(x.dtype))


def rms_norm(scale_D, x_BTD, eps: float):
  """Return `x` divided by its root mean square in float32, cast back, then scaled: HF's order, to the last bit."""
  x32_BTD = x_BTD.astype(jnp.float32)
  inverse_rms_BT1 = jax.lax.rsqrt(jnp.mean(x32_BTD * x32_BTD, -1, keepdims=True) + eps)
  return scale_D.astype(x_BTD.dtype)[None, None] * (x32_BTD * inverse_rms_BT1).astype(x_BTD.dtype)


def attn(weights, config: LlamaConfig, stream_BTD, rope, attend, mesh=None):
  """Return attention's contribution to the stream.

  `attend(q_BTNH, k_BTKH, v_BTKH)` returns the context of each query. `checkpoint_name` gives activations the names that
  memory.REMAT lists.
  """
  x_BTD = sharding.enter(rms_norm(weights["norm"], stream_BTD, config.norm_eps), mesh)
  q_BTNH = checkpoint_name(rope_lib.rotate(dot("BTD,DNH->BTNH", x_BTD, weights["wq"]), rope), "query")
  k_BTKH = checkpoint_name(rope_lib.rotate(dot("BTD,DKH->BTKH", x_BTD, weights["wk"]), rope), "key")
  v_BTKH = checkpoint_name(dot("BTD,DKH->BTKH", x_BTD, weights["wv"]), "value")
  return sharding.leave(dot("BTNH,NHD->BTD", attend(q_BTNH, k_BTKH, v_BTKH), weights["wo"]), mesh)


def mlp(weights, config: LlamaConfig, stream_BTD, mesh=None):
  """Return the contribution of the SwiGLU MLP to the stream."""
  x_BTD = sharding.enter(rms_norm(weights["norm"], stream_BTD, config.norm_eps), mesh)
  gate_BTF = checkpoint_name(dot("BTD,DF->BTF", x_BTD, weights["gate"]), "gate")
  up_BTF = checkpoint_name(dot("BTD,DF->BTF", x_BTD, weights["up"]), "up")
  return sharding.leave(dot("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, weights["down"]), mesh)


def block(weights, config: LlamaConfig, stream_BTD, rope, attend, mesh=None):
  """Return the stream after one layer; with a mesh, `weights` hold the device's heads and its part of the MLP width."""
  stream_BTD = stream_BTD + attn(weights["attn"], config, stream_BTD, rope, attend, mesh)
  stream_BTD = checkpoint_name(stream_BTD, "residual")
  return stream_BTD + mlp(weights["mlp"], config, stream_BTD, mesh)


def head(params, config: LlamaConfig):
  """Return the output matrix [V, D]."""
  return params["embed"] if config.tied else params["head"]


def logits(params, config: LlamaConfig, stream_BTD, mesh=None):
  """Return all float32 logits [B, T, V]: for decoding and tests; training/loss.py computes them in chunks."""
  weight_VD = head(params, config).astype(stream_BTD.dtype)
  logits_BTV = jnp.einsum(
    "BTD,VD->BTV",
    stream_BTD,
    weight_VD,
    preferred_element_type=jnp.float32,
    precision="highest" if stream_BTD.dtype == jnp.float32 else None,
  )
  return sharding.gather(logits_BTV, 2, mesh, (sharding.TENSOR,))


def unstack(params, config: LlamaConfig):
  """Return the params with a list of layers in place of the stack, so that `forward_cached` slices none per token."""
  if isinstance(params["layers"], list):
    return params
  return {
    **params,
    "layers": [
      jax.tree.map(lambda stacked: stacked[layer], params["layers"])  # noqa: B023, mapped at once
      for layer in range(config.num_layers)
    ],
  }


def forward_prompt(config: LlamaConfig, params, token_BT, start_B, attention: Attention, dtype, mesh=None, seen=None):
  """Return (stream_BTD after the last norm, keys and values of each layer as cached) of padded prompts.

      slot        0   1   2   3        start 2: the slots before it are padding, of another segment
      token       .   .   A   B
      position   -2  -1   0   1

  Activations have this `dtype`. With a mesh it runs on each device, as `Llama` does. The stream at padding is finite
  and is not used. `seen` is (position_BT, until_BT) where mistakes are hidden from later text (method/rewind.py).
  """
  place_BT = jnp.arange(token_BT.shape[1])[None] - start_B[:, None]
  rope = rope_lib.angles(config, place_BT if seen is None else seen[0])
  mask = attention.prepare((place_BT >= 0).astype(jnp.int32), *() if seen is None else seen[1:])
  stream_BTD = sharding.look_up(params["embed"], token_BT, dtype, mesh)
  read = []

  def attend(q_BTNH, k_BTKH, v_BTKH):
    read.append(as_cached(k_BTKH, v_BTKH, mesh))
    return attention.attend(q_BTNH, k_BTKH, v_BTKH, mask)

  for weights in unstack(params, config)["layers"]:
    stream_BTD = block(weights, config, stream_BTD, rope, attend, mesh)
  return rms_norm(params["norm"], stream_BTD, config.norm_eps), read


def forward_cached(config: LlamaConfig, params, token_BT, start_B, slot, cache, mesh=None, seen=None):
  """Return (stream_BTD after the last norm, cache with T more slots filled), the same numbers as the full pass.

      slot        0   1   2 | 3   4        slot = 3, T = 2, start 1
      token       .   A   B | c   d        slots before a row's start are padding
      position   -1   0   1 | 2   3
      c reads         x   x   x
      d reads         x   x   x   x        slots not yet filled are never read

  The cache is a ring: slot s is at place s % S and replaces slot s - S, so the T slots must not cross its end.
  Activations have the dtype of the cache; `slot` may be traced. With a mesh it runs on each device, as `Llama` does.
  `seen` is (position_BT, hidden_BS) where mistakes are hidden: these places are not read.
  """
  T, S = token_BT.shape[1], cache[0][1].shape[2]
  slot_T = slot + jnp.arange(T)
  rope = rope_lib.angles(config, slot_T[None] - start_B[:, None] if seen is None else seen[0])
  slot_S = slot_T[-1] - (slot_T[-1] - jnp.arange(S)) % S  # the newest slot at each place; below 0: none
  allowed_BTS = (slot_S[None, None] >= start_B[:, None, None]) & (slot_S[None, None] <= slot_T[None, :, None])
  if seen is not None:
    allowed_BTS &= ~seen[1][:, None]
  stream_BTD = sharding.look_up(params["embed"], token_BT, cache[0][0].dtype, mesh)
  filled = []

  def attend(q_BTNH, k_BTKH, v_BTKH):
    old, new = cache[len(filled)], as_cached(k_BTKH, v_BTKH, mesh)
    filled.append(tuple(map(jax.lax.dynamic_update_slice_in_dim, old, new, (slot % S,) * 2, slot_axes(mesh))))
    return attend_slots(q_BTNH, *filled[-1], allowed_BTS, mesh)

  # Unrolled: a cache carried through a scan is copied at every token on CPU.
  for weights in unstack(params, config)["layers"]:
    stream_BTD = block(weights, config, stream_BTD, rope, attend, mesh)
  return rms_norm(params["norm"], stream_BTD, config.norm_eps), filled


def declare(module: nn.Module, name: str, letters: str):
  """Declare the device's part of a parameter, axes named; nan until weights come from hf.load or build.init."""
  axes = tuple(AXES[letter] for letter in letters)
  init = nn.with_logical_partitioning(nn.initializers.constant(math.nan), axes)
  shape = (sharding.local_size(AXES[letter], module.config.size(letter), module.mesh) for letter in letters)
  return module.param(name, init, tuple(shape))


def declare_whole(module: nn.Module, name: str, letters: str, dtype=None):
  """Declare a parameter as `declare` does, and return it gathered along fsdp; with a slot, cast to `dtype` before."""
  weight = declare(module, name, letters)
  if module.has_variable(casting.COLLECTION, name):
    weight = casting.into_slot(weight, module.get_variable(casting.COLLECTION, name), dtype)
  return sharding.whole(weight, tuple(AXES[letter] for letter in letters), module.mesh)


class Weights(nn.Module):
  """Weights of one part of a layer, gathered along fsdp, as a dict; those with an adapter as lora.Adapted."""

  config: LlamaConfig
  part: str
  mesh: Mesh | None
  lora: lora_lib.Lora | None

  @nn.compact
  def __call__(self, dtype):
    table = WEIGHTS["layers"][self.part]
    weights = {name: declare_whole(self, name, letters, dtype) for name, letters in table.items()}
    for name in filter(table.__contains__, self.lora.matrices if self.lora else ()):
      adapter = self.get_variable(lora_lib.COLLECTION, name)
      weights[name] = lora_lib.adapted(weights[name], adapter, table[name], AXES, self.lora.scale, self.mesh)
    return weights


class Block(nn.Module):
  """One layer in the form that nn.scan needs: the stream is its carry."""

  config: LlamaConfig
  attention: Attention
  mesh: Mesh | None
  lora: lora_lib.Lora | None
  offload: bool

  @nn.compact
  def __call__(self, stream_BTD, rope, mask):
    if self.offload:
      stream_BTD = checkpoint_name(stream_BTD, memory.STREAM)
    weights = {
      part: Weights(self.config, part, self.mesh, self.lora, name=part)(stream_BTD.dtype) for part in WEIGHTS["layers"]
    }

    def attend(*qkv):
      return sharding.attend_whole_rows(lambda q, k, v: self.attention.attend(q, k, v, mask), *qkv, self.mesh)

    return block(weights, self.config, stream_BTD, rope, attend, self.mesh), None


class Llama(nn.Module):
  """Llama decoder without the output matrix.

  apply({"params": params}, token_BT, position_BT, segment_BT[, until_BT]) -> stream_BTD after the last norm (`compute`)
  apply({"params": frozen, "adapters": trained}, ...) -> the same with `lora` (adapters.py)

  With `num_top` the last layers are in "top" (top_layers.py): `below_top` returns the stream before them, `stream_BTD`
  gives it, and the rows of `markers` are in "adapters". Positions restart with each segment of a packed row; segments
  never read each other. With a mesh, `apply` runs on each device inside jax.shard_map, on its rows or its positions of
  them, and its parts of the parameters (sharding.py).
  """

  config: LlamaConfig
  compute: str
  remat: str
  attention: Attention = XLA
  mesh: Mesh | None = None
  lora: lora_lib.Lora | None = None
  num_top: int = 0
  markers: tuple[int, ...] = ()

  def __post_init__(self):
    super().__post_init__()
    if self.remat not in memory.REMAT:
      raise InputError(f"model.remat={self.remat!r}; must be one of {', '.join(map(repr, memory.REMAT))}")

  @nn.compact
  def __call__(self, token_BT, position_BT, segment_BT, until_BT=None, *, stream_BTD=None, below_top: bool = False):
    config, is_given = self.config, stream_BTD is not None
    if not is_given:
      embed_VD, replaced = declare(self, "embed", WEIGHTS["embed"]), None
      if markers := self.lora.markers if self.lora else self.markers:
        rows_MD = self.get_variable(lora_lib.COLLECTION, "rows")["embed"]
        replaced = lora_lib.replacing(rows_MD, markers)
      stream_BTD = sharding.look_up(embed_VD, token_BT, self.compute, self.mesh, replaced)
    rope = rope_lib.angles(config, position_BT)
    mask = self.attention.prepare(*sharding.whole_rows((segment_BT, until_BT), self.mesh))
    if not is_given:
      stream_BTD = _scanned(self, config.num_layers - self.num_top, "layers", stream_BTD, rope, mask)
    if below_top:
      return stream_BTD
    if self.num_top:
      stream_BTD = _scanned(self, self.num_top, "top", stream_BTD, rope, mask)
    if not config.tied:
      declare(self, "head", WEIGHTS["head"])  # declared only: the function `head` reads it
    return rms_norm(declare_whole(self, "norm", WEIGHTS["norm"]), stream_BTD, config.norm_eps)


def _scanned(model: Llama, num: int, name: str, stream_BTD, rope, mask):
  """Return the stream after `num` layers, whose stacked weights have this name; called in the model's `__call__`."""
  layer = Block
  if model.remat != "none" or (model.mesh is not None and sharding.size_over(model.mesh, sharding.FSDP) > 1):
    layer = nn.remat(Block, policy=memory.REMAT[model.remat], prevent_cse=False)  # a scan prevents CSE by itself
  axes = {"params": 0, casting.COLLECTION: 0} | ({lora_lib.COLLECTION: 0} if model.lora else {})
  named, whole = {nn.PARTITION_NAME: AXES["L"]}, (nn.broadcast, nn.broadcast)
  layers = nn.scan(
    layer, variable_axes=axes, split_rngs={"params": True}, in_axes=whole, length=num, metadata_params=named
  )
  # Named: lifted transforms would change an automatic name, and with it the path of every weight.
  layers = layers(model.config, model.attention, model.mesh, model.lora, model.remat == "offload", name=name)
  return layers(stream_BTD, rope, mask)[0]


def shapes(config: LlamaConfig):
  """Return the params as float32 ShapeDtypeStructs, each boxed with the names of its axes; nothing is computed."""
  token_BT = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  model = Llama(config, "float32", "none")
  return jax.eval_shape(model.init, jax.random.key(0), token_BT, token_BT, token_BT)["params"]


def unboxed_shapes(config: LlamaConfig):
  """Return the params as float32 ShapeDtypeStructs."""
  return nn.meta.unbox(shapes(config))
