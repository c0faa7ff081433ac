#!/usr/bin/env python3
"""make_gguf.py HF_DIR OUT.gguf f16|bf16: the model in llama.cpp's format, by its `gguf` package.

Matrices get the type, vectors f32, as with llama.cpp's own converter.
"""
import json
import os
import sys

import gguf
import numpy as np

hf_dir, out, dtype = sys.argv[1:]


def read_json(name):
    with open(os.path.join(hf_dir, name)) as file:
        return json.load(file)


config, tokenizer = read_json("config.json"), read_json("tokenizer.json")
writer = gguf.GGUFWriter(out, "qwen2")
writer.add_name("random qwen2")
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_block_count(config["num_hidden_layers"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(config["num_attention_heads"])
writer.add_head_count_kv(config["num_key_value_heads"])
writer.add_rope_freq_base(config["rope_theta"])
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
kinds = {"f16": gguf.LlamaFileType.MOSTLY_F16, "bf16": gguf.LlamaFileType.MOSTLY_BF16}
writer.add_file_type(kinds[dtype])

size = config["vocab_size"]
texts, types = [f"[PAD{i}]" for i in range(size)], [gguf.TokenType.UNUSED] * size
for text, i in tokenizer["model"]["vocab"].items():
    texts[i], types[i] = text, gguf.TokenType.NORMAL
for token in tokenizer["added_tokens"]:
    special = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    texts[token["id"]], types[token["id"]] = token["content"], special
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("qwen2")
writer.add_token_list(texts)
writer.add_token_types(types)
writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
writer.add_eos_token_id(151645)
writer.add_add_bos_token(False)

names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
path = os.path.join(hf_dir, "model.safetensors")
with open(path, "rb") as file:
    header_bytes = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(header_bytes))
data = np.memmap(path, np.uint8, "r", offset=8 + header_bytes)
for name, tensor in header.items():
    if name == "__metadata__":
        continue
    assert tensor["dtype"] == "BF16", "the model must be BF16"
    bits = data[slice(*tensor["data_offsets"])].view(np.uint16).reshape(tensor["shape"])
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    name = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if bits.ndim == 1:
        writer.add_tensor(name, values)
    elif dtype == "f16":
        writer.add_tensor(name, values.astype(np.float16))
    else:
        raw = np.ascontiguousarray(bits).view(np.uint8).reshape(bits.shape[0], -1)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
