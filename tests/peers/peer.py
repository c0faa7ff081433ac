#!/usr/bin/env python3
"""peer.py PROGRAM MODEL TYPE THREADS MODE REPETITIONS: see peers.py, which starts it and reads its one line of JSON.

PROGRAM is torch, openvino or mistralrs. MODEL is a directory with tokens.json.
"""
import json
import os
import sys
import time

START = float(os.environ["PEER_START"])
PROGRAM, MODEL, TYPE, THREADS, MODE, REPETITIONS = sys.argv[1:]
THREADS, REPETITIONS = int(THREADS), int(REPETITIONS)
with open(os.path.join(MODEL, "tokens.json")) as file:
    TOKENS = json.load(file)
os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS=str(THREADS))
os.environ["RAYON_NUM_THREADS"] = str(THREADS)


def timed(work):
    start = time.monotonic()
    result = work()
    return time.monotonic() - start, result


def torch():
    """PyTorch and transformers, eager, with its scaled dot product attention."""
    import torch
    from transformers import DynamicCache, Qwen2ForCausalLM

    torch.set_num_threads(THREADS)
    torch.inference_mode().__enter__()
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[TYPE]
    model = Qwen2ForCausalLM.from_pretrained(MODEL, dtype=dtype, attn_implementation="sdpa").eval()

    def step(tokens, cache):
        out = model(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    def generate(prompt, new):
        """Seconds of the prompt, seconds of the tokens after the first, and the tokens."""
        cache = DynamicCache()
        prefill, token = timed(lambda: step(TOKENS[:prompt], cache))
        tokens = [token]
        start = time.monotonic()
        while len(tokens) < new:
            tokens.append(step(tokens[-1:], cache))
        return prefill, time.monotonic() - start, tokens

    return generate


def openvino():
    """OpenVINO GenAI's pipeline; its cache of prefixes is off, or it would not compute a prompt that it has seen."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    hints = {"INFERENCE_PRECISION_HINT": TYPE, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    pipeline = genai.LLMPipeline(
        MODEL, "CPU", INFERENCE_NUM_THREADS=THREADS, scheduler_config=scheduler, **hints)

    def generate(prompt, new):
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        ids = ov.Tensor(np.array([TOKENS[:prompt]], np.int64))
        result = pipeline.generate(genai.TokenizedInputs(ids, ov.Tensor(np.ones((1, prompt), np.int64))), config)
        metrics = result.perf_metrics
        decode = metrics.get_tpot().mean / 1e3 * (new - 1) if new > 1 else 0
        return metrics.get_ttft().mean / 1e3, decode, [int(token) for token in result.tokens[0]]

    return generate


def mistralrs():
    """mistral.rs, which takes text only: as many tokens, of a text of its own. Its own measurements."""
    import mistralrs

    if THREADS == 1:
        os.sched_setaffinity(0, {0})
    dtype = {"bf16": mistralrs.ModelDType.BF16, "f16": mistralrs.ModelDType.F16}[TYPE]
    which = mistralrs.Which.Plain(model_id=MODEL, arch=mistralrs.Architecture.Qwen2, dtype=dtype)
    runner = mistralrs.Runner(which, prefix_cache_n=0, max_seqs=1, no_paged_attn=True)

    def generate(prompt, new):
        request = mistralrs.CompletionRequest(
            prompt="hello" + " hello" * (prompt - 1), model="default", max_tokens=new, temperature=0.0, top_k=1,
            ignore_eos=True)
        usage = runner.send_completion_request(request).usage
        assert usage.prompt_tokens == prompt and usage.completion_tokens == new, usage
        return prompt / usage.avg_prompt_tok_per_sec, usage.total_completion_time_sec, []

    return generate


generate = {"torch": torch, "openvino": openvino, "mistralrs": mistralrs}[PROGRAM]()
if MODE == "start":
    ready = time.monotonic() - START
    tokens = generate(16, 1)[2]
    print(json.dumps({"ready": ready, "first": time.monotonic() - START, "tokens": tokens}), flush=True)
else:
    prefill = [512 / generate(512, 1)[0] for _ in range(REPETITIONS + 1)]
    decode = [generate(32, 65) for _ in range(REPETITIONS + 1)]
    rates = [64 / seconds for _, seconds, _ in decode]
    print(json.dumps({"prefill": prefill[1:], "decode": rates[1:], "tokens": decode[-1][2][:8]}), flush=True)
# Some of these programs take long, or crash, when they end the usual way.
os._exit(0)
