//! `peer-candle MODEL_DIR TYPE THREADS MODE REPETITIONS`: see peers.py, which starts it and reads its one line of JSON.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::qwen2::{Config, ModelForCausalLM};
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;

/// Seconds since this process was started.
fn since_start() -> Result<f64> {
    let start: f64 = std::env::var("PEER_START").context("PEER_START")?.parse()?;
    let now = clock_gettime(ClockId::Monotonic);
    Ok(now.tv_sec as f64 + now.tv_nsec as f64 / 1e9 - start)
}

/// The most likely token after `tokens`.
fn step(model: &mut ModelForCausalLM, tokens: &[u32], position: usize) -> Result<u32> {
    let input = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
    let logits = model.forward(&input, position)?.flatten_all()?;
    Ok(logits.argmax(D::Minus1)?.to_scalar()?)
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let [_, dir, dtype, threads, mode, repetitions] = &args[..] else { bail!("wrong usage") };
    let dtype = match dtype.as_str() {
        "f16" => DType::F16,
        "f32" => DType::F32,
        other => bail!("no type {other}"),
    };
    let repetitions: usize = repetitions.parse()?;
    rayon::ThreadPoolBuilder::new().num_threads(threads.parse()?).build_global()?;
    let config: Config = serde_json::from_slice(&std::fs::read(format!("{dir}/config.json"))?)?;
    let tokens: Vec<u32> = serde_json::from_slice(&std::fs::read(format!("{dir}/tokens.json"))?)?;
    // SAFETY: nobody writes to the file meanwhile.
    let weights = unsafe {
        VarBuilder::from_mmaped_safetensors(&[format!("{dir}/model.safetensors")], dtype, &Device::Cpu)?
    };
    let mut model = ModelForCausalLM::new(&config, weights)?;
    let ready = since_start()?;
    if mode == "start" {
        let token = step(&mut model, &tokens[..16], 0)?;
        println!("{}", json!({ "ready": ready, "first": since_start()?, "tokens": [token] }));
        return Ok(());
    }
    let (mut prefill, mut decode, mut chosen) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..=repetitions {
        model.clear_kv_cache();
        let start = Instant::now();
        step(&mut model, &tokens[..512], 0)?;
        prefill.push(512.0 / start.elapsed().as_secs_f64());
    }
    for _ in 0..=repetitions {
        model.clear_kv_cache();
        chosen = vec![step(&mut model, &tokens[..32], 0)?];
        let start = Instant::now();
        for i in 0..64 {
            let token = step(&mut model, &chosen[i..], 32 + i)?;
            chosen.push(token);
        }
        decode.push(64.0 / start.elapsed().as_secs_f64());
    }
    let result = json!({ "prefill": prefill[1..], "decode": decode[1..], "tokens": chosen[..8] });
    println!("{result}");
    Ok(())
}
