"""A Llama in NumPy float64, written from HF's description alone: config.json's fields and HF's tensors in, logits out.

Nothing of the package is imported, nothing is fast, and nothing is shared with what it checks. Letters: model/llama.py.
"""

import json
import math
import pathlib

import ml_dtypes
import numpy as np

FIELDS = {  # a small model with every feature: grouped heads, heads wider than width / heads, llama3 scaling
  "architectures": ["LlamaForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "bos_token_id": 1,
  "eos_token_id": [2, 3],
  "head_dim": 24,
  "hidden_act": "silu",
  "hidden_size": 64,
  "initializer_range": 0.2,
  "intermediate_size": 96,
  "max_position_embeddings": 256,
  "mlp_bias": False,
  "model_type": "llama",
  "num_attention_heads": 4,
  "num_hidden_layers": 2,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-5,
  "rope_scaling": {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
  },
  "rope_theta": 10000.0,
  "tie_word_embeddings": False,
  "torch_dtype": "float32",
  "use_cache": True,
  "vocab_size": 80,
}


def shapes(fields):
  """HF's tensors and their shapes."""
  V, D, F = fields["vocab_size"], fields["hidden_size"], fields["intermediate_size"]
  N, K, H = fields["num_attention_heads"], fields["num_key_value_heads"], fields["head_dim"]
  result = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
  if not fields["tie_word_embeddings"]:
    result["lm_head.weight"] = (V, D)
  for layer in range(fields["num_hidden_layers"]):
    result |= {
      f"model.layers.{layer}.{name}.weight": shape
      for name, shape in {
        "input_layernorm": (D,),
        "self_attn.q_proj": (N * H, D),
        "self_attn.k_proj": (K * H, D),
        "self_attn.v_proj": (K * H, D),
        "self_attn.o_proj": (D, N * H),
        "post_attention_layernorm": (D,),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
      }.items()
    }
  return result


def random_tensors(fields, seed=0):
  """Float32 weights, norms about 1, large enough that every path through the model matters to the logits."""
  rng = np.random.default_rng(seed)
  return {
    name: (
      rng.normal(size=shape) * (0.3 if len(shape) == 1 else fields["initializer_range"]) + (len(shape) == 1)
    ).astype(np.float32)
    for name, shape in shapes(fields).items()
  }


def write_folder(folder, fields, tensors, files=1):
  """An HF folder of one or several safetensors files, written here byte by byte."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(fields))
  names = sorted(tensors)
  shards = [names[start::files] for start in range(files)]
  for number, shard in enumerate(shards, 1):
    name = "model.safetensors" if files == 1 else f"model-{number:05d}-of-{files:05d}.safetensors"
    write_file(folder / name, {tensor: tensors[tensor] for tensor in shard})
  if files > 1:
    (folder / "model.safetensors.index.json").write_text(
      json.dumps(
        {
          "metadata": {},
          "weight_map": {
            tensor: f"model-{number:05d}-of-{files:05d}.safetensors"
            for number, shard in enumerate(shards, 1)
            for tensor in shard
          },
        }
      )
    )
  return folder


def write_file(path, tensors):
  """A safetensors file."""
  codes = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(ml_dtypes.bfloat16): "BF16"}
  header, data = {}, b""
  for name, tensor in tensors.items():
    code = codes[tensor.dtype]
    header[name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [len(data), len(data) + tensor.nbytes]}
    data += tensor.tobytes()
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def rms_norm(x_TD, scale_D, eps):
  return x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + eps) * scale_D


def frequencies(fields):
  """Radians per position of each pair, by the three cases of the Llama 3.1 paper's code."""
  H, scaling = fields["head_dim"], fields["rope_scaling"]
  result = [fields["rope_theta"] ** (-pair / H) for pair in range(0, H, 2)]
  if scaling is None:
    return np.array(result)
  low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
  turns = [scaling["original_max_position_embeddings"] * frequency / (2 * math.pi) for frequency in result]
  for pair, (frequency, turned) in enumerate(zip(result, turns, strict=True)):
    if turned < low:
      result[pair] = frequency / scaling["factor"]
    elif turned <= high:
      smooth = (turned - low) / (high - low)
      result[pair] = (1 - smooth) * frequency / scaling["factor"] + smooth * frequency
  return np.array(result)


def rotate(x_TH, position_T, frequency):
  """One head, pair (i, i + H / 2) turned as a complex number."""
  half = x_TH.shape[1] // 2
  turned = (x_TH[:, :half] + 1j * x_TH[:, half:]) * np.exp(1j * np.outer(position_T, frequency))
  return np.concatenate((turned.real, turned.imag), 1)


def attention(fields, tensors, prefix, x_TD, position_T, segment_T):
  """Head by head; the output of o_proj."""
  N, K, H = fields["num_attention_heads"], fields["num_key_value_heads"], fields["head_dim"]
  q, k, v = (x_TD @ tensors[f"{prefix}.{name}_proj.weight"].T for name in "qkv")
  T = len(x_TD)
  allowed_TS = np.tril(np.ones((T, T), bool)) & (segment_T[:, None] == segment_T[None])
  contexts = []
  for head in range(N):
    group = head // (N // K)
    q_TH = rotate(q[:, head * H : (head + 1) * H], position_T, frequencies(fields))
    k_TH = rotate(k[:, group * H : (group + 1) * H], position_T, frequencies(fields))
    score_TS = np.where(allowed_TS, q_TH @ k_TH.T / math.sqrt(H), -np.inf)
    weight_TS = np.exp(score_TS - score_TS.max(-1, keepdims=True))
    contexts.append(weight_TS / weight_TS.sum(-1, keepdims=True) @ v[:, group * H : (group + 1) * H])
  return np.concatenate(contexts, 1) @ tensors[f"{prefix}.o_proj.weight"].T


def weights(q_TH, k_TH, segment_T, until_T=None):
  """Softmax [T, S] of one head's scores, causal within segments, t reading s only before until_s where it is given."""
  allowed_TS = np.tri(len(segment_T), dtype=bool) & (segment_T[:, None] == segment_T[None])
  if until_T is not None:
    allowed_TS &= np.arange(len(segment_T))[:, None] < until_T[None]
  score_TS = np.where(allowed_TS, q_TH @ k_TH.T / math.sqrt(q_TH.shape[1]), -np.inf)
  weight_TS = np.exp(score_TS - score_TS.max(-1, keepdims=True))
  return weight_TS / weight_TS.sum(-1, keepdims=True)


def context(q_TNH, k_TKH, v_TKH, segment_T, until_T=None):
  """What the queries read, [T, N, H]."""
  G = q_TNH.shape[1] // k_TKH.shape[1]
  return np.stack(
    [
      weights(q_TNH[:, head], k_TKH[:, head // G], segment_T, until_T) @ v_TKH[:, head // G]
      for head in range(q_TNH.shape[1])
    ],
    1,
  )


def context_gradients(q_TNH, k_TKH, v_TKH, segment_T, d_context_TNH, until_T=None):
  """Gradients of q, k, v by the chain rule."""
  H, G = q_TNH.shape[2], q_TNH.shape[1] // k_TKH.shape[1]
  d_q_TNH, d_k_TKH, d_v_TKH = (np.zeros_like(x) for x in (q_TNH, k_TKH, v_TKH))
  for head in range(q_TNH.shape[1]):
    group, d_context_TH = head // G, d_context_TNH[:, head]
    weight_TS = weights(q_TNH[:, head], k_TKH[:, group], segment_T, until_T)
    d_weight_TS = d_context_TH @ v_TKH[:, group].T
    d_score_TS = weight_TS * (d_weight_TS - (weight_TS * d_weight_TS).sum(-1, keepdims=True)) / math.sqrt(H)
    d_q_TNH[:, head] = d_score_TS @ k_TKH[:, group]
    d_k_TKH[:, group] += d_score_TS.T @ q_TNH[:, head]
    d_v_TKH[:, group] += weight_TS.T @ d_context_TH
  return d_q_TNH, d_k_TKH, d_v_TKH


def mlp(tensors, prefix, x_TD):
  gate = x_TD @ tensors[f"{prefix}.gate_proj.weight"].T
  up = x_TD @ tensors[f"{prefix}.up_proj.weight"].T
  return (gate / (1 + np.exp(-gate)) * up) @ tensors[f"{prefix}.down_proj.weight"].T


def layer(fields, tensors, number, stream_TD, position_T, segment_T):
  """The stream after layer `number`."""
  prefix, eps = f"model.layers.{number}", fields["rms_norm_eps"]
  x_TD = rms_norm(stream_TD, tensors[f"{prefix}.input_layernorm.weight"], eps)
  stream_TD = stream_TD + attention(fields, tensors, f"{prefix}.self_attn", x_TD, position_T, segment_T)
  x_TD = rms_norm(stream_TD, tensors[f"{prefix}.post_attention_layernorm.weight"], eps)
  return stream_TD + mlp(tensors, f"{prefix}.mlp", x_TD)


def logits(fields, tensors, token_T, position_T=None, segment_T=None):
  """Float64 logits [T, V]; positions 0, 1, ... and one segment unless given."""
  tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
  position_T = np.arange(len(token_T)) if position_T is None else position_T
  segment_T = np.ones(len(token_T), int) if segment_T is None else segment_T
  stream_TD = tensors["model.embed_tokens.weight"][token_T]
  for number in range(fields["num_hidden_layers"]):
    stream_TD = layer(fields, tensors, number, stream_TD, position_T, segment_T)
  stream_TD = rms_norm(stream_TD, tensors["model.norm.weight"], fields["rms_norm_eps"])
  return stream_TD @ tensors["model.embed_tokens.weight" if fields["tie_word_embeddings"] else "lm_head.weight"].T
