"""Writes Hugging Face Qwen2 model directories: safetensors and JSON. Needs numpy only."""
import json
import math
import os

import numpy as np


def f32_to_bf16(x):
    """float32 -> bfloat16 bit patterns (uint16), rounded to nearest even."""
    if not np.isfinite(x).all():
        raise ValueError("a weight is not finite")
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


# short name: (safetensors dtype, config.json torch_dtype, float32 array -> array as stored)
STORAGE = {
    "bf16": ("BF16", "bfloat16", f32_to_bf16),
    "f16": ("F16", "float16", lambda x: np.ascontiguousarray(x, np.float32).astype("<f2")),
    "f32": ("F32", "float32", lambda x: np.ascontiguousarray(x, "<f4")),
}


def tensor_shapes(config):
    """Yields (name, shape) of every tensor of the model, in the order of execution."""
    h, i, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim", h // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    yield "model.embed_tokens.weight", (v, h)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        yield p + "input_layernorm.weight", (h,)
        for name, n in (("q", q), ("k", kv), ("v", kv)):
            yield p + f"self_attn.{name}_proj.weight", (n, h)
            yield p + f"self_attn.{name}_proj.bias", (n,)
        yield p + "self_attn.o_proj.weight", (h, q)
        yield p + "post_attention_layernorm.weight", (h,)
        yield p + "mlp.gate_proj.weight", (i, h)
        yield p + "mlp.up_proj.weight", (i, h)
        yield p + "mlp.down_proj.weight", (h, i)
    yield "model.norm.weight", (h,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (v, h)


def write_safetensors(path, shapes, storage, weight):
    """Writes the tensors `shapes` ([(name, shape)]) one after the other; `weight(name, shape)` gives each as float32.

    The file: length of the header (8 bytes, little-endian), header (JSON, padded to 8 bytes), data.
    """
    dtype, _, encode = STORAGE[storage]
    size = 4 if dtype == "F32" else 2
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes:
        end = offset + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(header, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, shape in shapes:
            values = weight(name, shape)
            if values.shape != shape:
                raise ValueError(f"{name} has shape {values.shape}, expected {shape}")
            file.write(encode(values).tobytes())


def write_weights(directory, shapes, storage, weight, shards=1):
    """Writes model.safetensors, or `shards` files of equally many tensors with their index."""
    if shards == 1:
        return write_safetensors(os.path.join(directory, "model.safetensors"), shapes, storage, weight)
    per_shard = -(-len(shapes) // shards)
    weight_map, elements = {}, 0
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = shapes[shard * per_shard : (shard + 1) * per_shard]
        write_safetensors(os.path.join(directory, name), part, storage, weight)
        weight_map.update({tensor: name for tensor, _ in part})
        elements += sum(math.prod(shape) for _, shape in part)
    index = {"metadata": {"total_size": elements * (4 if storage == "f32" else 2)}, "weight_map": weight_map}
    write_json(directory, "model.safetensors.index.json", index)


def write_json(directory, name, value):
    """Writes one JSON file of the directory."""
    with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def config_json(storage, **fields):
    """config.json: the fields given, and those that are the same in every Qwen2 model."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_window_layers": fields["num_hidden_layers"],
        "model_type": "qwen2",
        "sliding_window": fields["max_position_embeddings"],
        "torch_dtype": STORAGE[storage][1],
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_sliding_window": False,
        **fields,
    }
