#!/usr/bin/env python3
"""Whether what `mrt unpack` wrote gives the logits of its source in transformers, bit for bit, once the source's weights
are rounded to FP16. Needs torch and transformers:

    mr-convert SOURCE model.mrt && mrt unpack model.mrt UNPACKED
    compare_unpacked.py SOURCE UNPACKED
"""

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM


def logits(directory, to_fp16):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    if to_fp16:
        for weight in model.parameters():
            weight.data = weight.data.half().float()
    vocab = model.config.vocab_size
    tokens = torch.arange(1, 65) * 7919 % vocab
    with torch.no_grad():
        return model(tokens[None]).logits[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source")
    parser.add_argument("unpacked")
    args = parser.parse_args()
    expected, found = logits(args.source, True), logits(args.unpacked, False)
    if not torch.equal(expected, found):
        sys.exit(f"{args.unpacked}: logits differ from {args.source} by up to {(expected - found).abs().max()}")
    print(f"{args.unpacked}: all {found.numel()} logits are those of {args.source}, bit for bit")


if __name__ == "__main__":
    main()
