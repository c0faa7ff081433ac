#!/usr/bin/env python3
"""Writes transformers' results for the tiny models of make_tiny_qwen2.py into their directories.

    pip install numpy==2.4.6 torch==2.15.0 transformers==5.23.0
    make_tiny_qwen2.py OUT_DIR && make_tiny_goldens.py OUT_DIR

The reference computes in float32 with weights rounded as a .mrt file rounds them (stored dtype -> FP16 -> float32).
Each directory gets, for a few prompts:
  golden_logits.bin       float32 LE [rows, vocab]: the logits of every position, or of `positions` where they are named
  golden_logits_kv16.bin  the same with K (after RoPE) and V rounded to FP16, as an FP16 KV cache holds them
  golden.json             prompts, the rows' positions, greedy continuations and each step's lead over the second best
"""
import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.models.qwen2 import modeling_qwen2  # noqa: E402

from make_tiny_qwen2 import MODELS  # noqa: E402

GREEDY_TOKENS = 24


def load(directory):
    """The model in float32, its parameters rounded to FP16.

    Not model.half().float(): that would also round the frequencies of RoPE.
    """
    with open(os.path.join(directory, "config.json"), encoding="utf-8") as file:
        stored = getattr(torch, json.load(file)["torch_dtype"])
    model, info = transformers.Qwen2ForCausalLM.from_pretrained(
        directory, dtype=stored, attn_implementation="eager", output_loading_info=True
    )
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        sys.exit(f"{directory}: {info}")
    model = model.float().eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    return model


class Fp16KvCache:
    """While entered, attention sees K and V rounded to FP16."""

    def __enter__(self):
        self.original = modeling_qwen2.eager_attention_forward

        def rounded(module, query, key, value, *args, **kwargs):
            return self.original(module, query, key.half().float(), value.half().float(), *args, **kwargs)

        modeling_qwen2.eager_attention_forward = rounded

    def __exit__(self, *_):
        modeling_qwen2.eager_attention_forward = self.original


def run(model, ids):
    """(logits of every position, greedy tokens, their leads)"""
    logits = model(torch.tensor([ids])).logits[0]
    sequence, margins = list(ids), []
    for _ in range(GREEDY_TOKENS):
        best = model(torch.tensor([sequence])).logits[0, -1].topk(2)
        sequence.append(int(best.indices[0]))
        margins.append(round(float(best.values[0] - best.values[1]), 5))
    return logits, sequence[len(ids) :], margins


def prompts(vocab, seed):
    """One token; a few; special ids and a repeated one; and 64, of which every 9th row is kept."""
    rng = np.random.Generator(np.random.PCG64(seed + 10000))
    one = [int(rng.integers(vocab))]
    few = rng.integers(0, vocab, 5).tolist()
    special = [0, vocab - 1, vocab - 1, 0] + rng.integers(0, vocab, 13).tolist()
    return [(one, None), (few, None), (special, None), (rng.integers(0, vocab, 64).tolist(), list(range(0, 64, 9)))]


def write_goldens(directory, seed):
    model = load(directory)
    vocab = model.config.vocab_size
    results, all_logits, all_logits_kv16 = [], [], []
    for ids, positions in prompts(vocab, seed):
        logits, greedy, margins = run(model, ids)
        with Fp16KvCache():
            logits_kv16, greedy_kv16, margins_kv16 = run(model, ids)
        result = {
            "ids": ids,
            "greedy": greedy,
            "greedy_margin": margins,
            "greedy_kv16": greedy_kv16,
            "greedy_kv16_margin": margins_kv16,
            "max_abs_logit": round(float(logits.abs().max()), 4),
            "fp16_kv_max_dlogit": round(float((logits_kv16 - logits).abs().max()), 6),
        }
        if positions:
            result["positions"] = positions
            logits, logits_kv16 = logits[positions], logits_kv16[positions]
        results.append(result)
        all_logits.append(logits.numpy().astype("<f4"))
        all_logits_kv16.append(logits_kv16.numpy().astype("<f4"))
    np.concatenate(all_logits).tofile(os.path.join(directory, "golden_logits.bin"))
    np.concatenate(all_logits_kv16).tofile(os.path.join(directory, "golden_logits_kv16.bin"))
    golden = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vocab": vocab,
        "prompts": results,
    }
    with open(os.path.join(directory, "golden.json"), "w", encoding="utf-8") as file:
        json.dump(golden, file, separators=(",", ":"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    transformers.utils.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    for name, spec in MODELS.items():
        write_goldens(os.path.join(sys.argv[1], name), spec["seed"])
