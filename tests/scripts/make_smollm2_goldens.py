#!/usr/bin/env python3
"""Writes transformers' results for SmolLM2-135M-Instruct, for the prompts of tests/goldens/smollm2/golden.json, beside it.

    pip install numpy==2.4.6 torch==2.15.0 transformers==5.23.0
    make_smollm2_goldens.py $(models/get_smollm2.py)

The reference computes in float32 with weights rounded as a .mrt file rounds them (BF16 -> FP16 -> float32).
  golden.json        of each prompt its greedy continuation, by how much each step leads, and how far an FP16 KV cache moves
                     a logit after the prompt
  golden_logits.bin  float32 LE [prompts, vocab]: the logits after each prompt
  golden_nll.bin     float32 LE [4095]: the negative log likelihood of each token of the text but the first, in nats
"""
import json
import os
import sys

import numpy as np
import torch
import transformers

from make_tiny_goldens import Fp16KvCache, load

GOLDENS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "goldens", "smollm2")
GREEDY_TOKENS = 64


def continue_greedily(model, ids):
    """(logits after `ids`, greedy tokens, their leads)"""
    output = model(torch.tensor([ids]), use_cache=True)
    logits, tokens, margins = output.logits[0, -1], [], []
    for _ in range(GREEDY_TOKENS):
        best = output.logits[0, -1].topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(round(float(best.values[0] - best.values[1]), 5))
        output = model(torch.tensor([[tokens[-1]]]), past_key_values=output.past_key_values, use_cache=True)
    return logits, tokens, margins


def negative_log_likelihoods(model, ids):
    logits = model(torch.tensor([ids])).logits[0, :-1]
    targets = torch.tensor(ids[1:])
    parts = zip(logits.split(256), targets.split(256))  # a part at a time: the whole would be copied
    return torch.cat([torch.nn.functional.cross_entropy(*part, reduction="none") for part in parts])


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    transformers.utils.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    model = load(sys.argv[1])
    path = os.path.join(GOLDENS, "golden.json")
    with open(path, encoding="utf-8") as file:
        golden = json.load(file)
    all_logits = []
    for prompt in golden["prompts"]:
        logits, prompt["greedy"], prompt["greedy_margin"] = continue_greedily(model, prompt["ids"])
        with Fp16KvCache():
            kv16 = model(torch.tensor([prompt["ids"]]), logits_to_keep=1).logits[0, -1]
        prompt["fp16_kv_max_dlogit"] = round(float((kv16 - logits).abs().max()), 6)
        all_logits.append(logits.numpy().astype("<f4"))
    np.stack(all_logits).tofile(os.path.join(GOLDENS, "golden_logits.bin"))
    model.set_attn_implementation("sdpa")
    nll = negative_log_likelihoods(model, golden["text"]["ids"])
    nll.numpy().astype("<f4").tofile(os.path.join(GOLDENS, "golden_nll.bin"))
    with open(path, "w", encoding="utf-8") as file:
        json.dump(golden, file, separators=(",", ":"), ensure_ascii=False)


if __name__ == "__main__":
    main()
