#!/usr/bin/env python3
"""Makes the tiny random Qwen2 models of the tests, each for one thing that can go wrong.

    make_tiny_qwen2.py OUT_DIR

The weights come from PCG64 with a fixed seed, so the files are the same everywhere. Their scales are large enough that
attention is far from uniform and that every part of the model moves the logits.
"""
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "models"))
import fetch

fetch.use_requirements()

import numpy as np  # noqa: E402

from qwen2_dir import config_json, tensor_shapes, write_json, write_weights  # noqa: E402

DEFAULTS = {
    "vocab": 320,
    "hidden": 64,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "intermediate": 112,
    "tied": True,
    "storage": "bf16",
    "shards": 1,
    "theta": 1e6,
    "eps": 1e-6,
}
MODELS = {
    "tied": {"seed": 1, "theta": 1e4},
    "untied": {"seed": 2, "tied": False},
    "gqa7_hd32": {"seed": 3, "vocab": 272, "hidden": 224, "layers": 1, "heads": 7, "kv_heads": 1, "intermediate": 64},
    "gqa7_hd64": {"seed": 11, "vocab": 128, "hidden": 448, "layers": 1, "heads": 7, "kv_heads": 1, "intermediate": 16},
    "gqa7_head_dim": {"seed": 12, "heads": 7, "kv_heads": 1, "head_dim": 64},  # hidden is not heads * head_dim
    "vocab_odd": {"seed": 4, "vocab": 331, "tied": False, "embedding_scale": 0.002},  # small activations: eps matters
    "inter_odd": {"seed": 5, "intermediate": 107, "eps": 1e-5},
    "sharded3": {"seed": 6, "layers": 3, "kv_heads": 1, "intermediate": 96, "tied": False, "shards": 3},
    "store_f32": {"seed": 7, "storage": "f32"},
    "store_f16": {"seed": 8, "kv_heads": 4, "storage": "f16"},
    "big_bias": {"seed": 9, "bias_scale": 8.0},
    "extremes": {"seed": 10, "fp16_extremes": True},
}


def make(out_dir, name):
    """Writes one model directory."""
    spec = {**DEFAULTS, **MODELS[name]}
    vocab, hidden, heads = spec["vocab"], spec["hidden"], spec["heads"]
    config = config_json(
        spec["storage"],
        bos_token_id=vocab - 3,
        eos_token_id=vocab - 1,
        hidden_size=hidden,
        intermediate_size=spec["intermediate"],
        max_position_embeddings=512,
        num_attention_heads=heads,
        num_hidden_layers=spec["layers"],
        num_key_value_heads=spec["kv_heads"],
        rms_norm_eps=spec["eps"],
        rope_theta=spec["theta"],
        tie_word_embeddings=spec["tied"],
        vocab_size=vocab,
        **({"head_dim": spec["head_dim"]} if "head_dim" in spec else {}),
    )
    rng = np.random.Generator(np.random.PCG64(spec["seed"]))

    def scale(tensor, columns):
        if "embed_tokens" in tensor:
            return spec.get("embedding_scale", 0.25 if spec["tied"] else 0.5)
        if tensor.endswith(".bias"):
            return 0.5 if "v_proj" in tensor else 0.5 * spec.get("bias_scale", 1.0)
        if "o_proj" in tensor:
            return 1 / columns**0.5
        if "mlp" in tensor:
            return 1.5 / columns**0.5
        return (2 if "lm_head" in tensor else 1.6) / columns**0.5

    def weight(tensor, shape):
        if tensor.endswith("norm.weight"):
            return 1 + (rng.standard_normal(shape) * 0.2).astype(np.float32)
        w = (rng.standard_normal(shape) * scale(tensor, shape[-1])).astype(np.float32)
        if spec.get("fp16_extremes") and tensor.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            # values that FP16 holds only as subnormals, and values that it flushes to zero
            for share, factor in ((0.1, 2.0**-14), (0.05, 2.0**-24)):
                w = np.where(rng.random(shape) < share, w * np.float32(factor), w).astype(np.float32)
        return w

    directory = os.path.join(out_dir, name)
    os.makedirs(directory, exist_ok=True)
    write_weights(directory, list(tensor_shapes(config)), spec["storage"], weight, spec["shards"])
    write_json(directory, "config.json", config)
    generation = {"bos_token_id": vocab - 3, "eos_token_id": [vocab - 1, vocab - 3], "pad_token_id": vocab - 3}
    write_json(directory, "generation_config.json", {**generation, "do_sample": False})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for name in MODELS:
        make(sys.argv[1], name)
