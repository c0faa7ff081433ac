#!/usr/bin/env python3
"""Makes a model with random weights and exactly the shape of Qwen2.5-0.5B-Instruct: for measuring speed.

    make_random_qwen2.py OUT_DIR [--dtype bf16|f16|f32] [--tokenizer-dir DIR] [--seed N]

Writes config.json, generation_config.json, model.safetensors and tokens.json (512 token ids, none of them special:
a prompt for benchmarks). The weights are normal with deviation 0.02, those of the norms are 1. They are rounded to
BF16 whatever the dtype, so that models of every dtype hold the same numbers (F16 rounds the smallest once more).
"""
import argparse
import os
import shutil

import fetch

fetch.use_requirements()

import numpy as np  # noqa: E402

from qwen2_dir import config_json, f32_to_bf16, tensor_shapes, write_json, write_weights  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description="A random model of Qwen2.5-0.5B's shape.")
    parser.add_argument("out_dir")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "f16", "f32"])
    parser.add_argument("--tokenizer-dir", help="take tokenizer.json and tokenizer_config.json from here")
    parser.add_argument("--seed", type=int, default=20240919)
    args = parser.parse_args()

    config = config_json(
        args.dtype,
        bos_token_id=151643,
        eos_token_id=151645,
        hidden_size=896,
        intermediate_size=4864,
        max_position_embeddings=32768,
        num_attention_heads=14,
        num_hidden_layers=24,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=True,
        vocab_size=151936,
    )
    rng = np.random.Generator(np.random.PCG64(args.seed))

    def weight(name, shape):
        if name.endswith("norm.weight"):
            return np.ones(shape, np.float32)
        bits = f32_to_bf16(rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02))
        return (bits.astype(np.uint32) << 16).view(np.float32)

    os.makedirs(args.out_dir, exist_ok=True)
    write_weights(args.out_dir, list(tensor_shapes(config)), args.dtype, weight)
    write_json(args.out_dir, "config.json", config)
    generation = {"bos_token_id": 151643, "eos_token_id": [151645, 151643], "pad_token_id": 151643, "do_sample": False}
    write_json(args.out_dir, "generation_config.json", generation)
    prompt = np.random.Generator(np.random.PCG64(1)).integers(0, 151643, 512)
    write_json(args.out_dir, "tokens.json", prompt.tolist())
    if args.tokenizer_dir:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(os.path.join(args.tokenizer_dir, name), os.path.join(args.out_dir, name))


if __name__ == "__main__":
    main()
