#!/usr/bin/env python3
"""What bfloat16 costs transformers, beside float32, on the tokens of tests/goldens/smollm2/golden.json: what
`mr-bench quality` says of the fast lane.

    tests/scripts/transformers_bf16_quality.py models/SmolLM2-135M-Instruct

Needs the packages torch and transformers.
"""

import json
import os
import sys

import torch
import transformers

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../goldens/smollm2/golden.json")


def log_probabilities(directory, dtype, ids):
    """Of each next token but the first, `[tokens - 1][vocab]`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    with torch.no_grad():
        return torch.log_softmax(model(ids).logits[0, :-1].float(), -1)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with open(GOLDEN) as file:
        ids = torch.tensor([json.load(file)["text"]["ids"]])
    exact, fast = (log_probabilities(sys.argv[1], dtype, ids) for dtype in (torch.float32, torch.bfloat16))
    for name, log_p in (("float32", exact), ("bfloat16", fast)):
        perplexity = -log_p.gather(1, ids[0, 1:, None]).mean()
        print(f"perplexity, {name}: {perplexity.exp():.4f}")
    kl = (exact.exp() * (exact - fast)).sum(-1)
    same = (exact.argmax(-1) == fast.argmax(-1)).float().mean()
    print(f"KL divergence: {kl.mean():.3e} nats in the mean, {kl.max():.3e} at most; same most likely token: {same:.3%}")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
