//! What the fast lane of this machine costs in accuracy, on a real model, SmolLM2-135M-Instruct.

#![forbid(unsafe_code)]

use mruntime::{FastLane, Isa, Numerics};
use mruntime_tests::smollm2_golden::Golden;
use mruntime_tests::{Run, kl_divergence, smollm2_weights, with_model};

/// The lane of this machine's best instruction set, where that is known otherwise: by the manuals of the processors that qemu
/// plays, whose name it reads from the same variable, and on x86-64 by what Linux says of the processor.
fn expected_lane() -> Option<Option<&'static str>> {
    match std::env::var("QEMU_CPU").as_deref() {
        Ok("max") => return Some(Some("fast-fhm")),
        Ok("cortex-a76" | "neoverse-n1") => return Some(Some("fast-fp16")),
        _ => (),
    }
    if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        return None;
    }
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let has = |word: &str| cpu.split_whitespace().any(|found| found == word);
    let lanes: &[_] = if has("GenuineIntel") {
        &[("fast-amx", "amx_bf16"), ("fast-fp16", "avx512_fp16")]
    } else {
        &[("fast-bf16", "avx512_bf16")]
    };
    Some(lanes.iter().find(|(_, flag)| has(flag)).map(|(name, _)| *name))
}

#[test]
fn the_fast_lane_predicts_as_transformers_does_in_float32() {
    let run = Run::usual();
    let lane = FastLane::detect(run.isa);
    if let Some(expected) = expected_lane() {
        assert_eq!(lane.map(FastLane::name), expected);
    }
    let Some(lane) = lane else {
        println!("{} has no fast lane", Isa::detect().name());
        return;
    };
    let (cfg, weights) = smollm2_weights();
    let prompt = Golden::read().prompts.into_iter().find(|prompt| prompt.name == "raw17").unwrap();
    let (last, first) = prompt.ids.split_last().unwrap();
    assert!(lane.takes(first.len()));

    let mut ours = vec![0.0; prompt.logits.len()];
    with_model(cfg, weights.bytes(), first.len() + 1, run, |mut ready| {
        ready.scratch.set_numerics(Numerics::Fast(lane));
        ready.forward(first, &mut []);
        ready.forward(&[*last], &mut ours);
    });
    let kl = kl_divergence(&prompt.logits, &ours);
    println!("{}: KL divergence {kl:.2e} nats", lane.name());
    // Measured: 6.3e-6 with fast-fhm, 7.6e-6 with fast-fp16 (5.7e-6 on x86-64, where the last token is exact), 2.6e-5 with
    // fast-bf16, 3.6e-5 with fast-amx, which all are far from a wrong result.
    assert!(kl < 5e-5, "{kl}");
}
