//! `mr-bench speed --profile` and `--trace`: where the time of forward passes goes, operation by operation.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use mruntime::{Observation, Qwen2Config, Stage};
use serde::Serialize;
use serde_json::{Value, json};

use crate::roofline::Limit;
use crate::work::{Work, stage_work};

/// One operation of one forward pass; times count from the beginning of the recording.
pub struct Span {
    stage: Stage,
    layer: usize,
    position: usize,
    tokens: usize,
    start: Duration,
    end: Duration,
}

/// Takes down when each operation ended, as an observer of forward passes.
pub struct Recorder {
    origin: Instant,
    last: Duration,
    pub spans: Vec<Span>,
}

impl Recorder {
    pub fn new() -> Recorder {
        Recorder { origin: Instant::now(), last: Duration::ZERO, spans: Vec::new() }
    }

    /// To be called right before a forward pass: its first operation begins now.
    pub fn begin(&mut self) {
        self.last = self.origin.elapsed();
    }

    /// The observer.
    pub fn observe(&mut self, o: Observation<'_>) {
        let (start, end) = (self.last, self.origin.elapsed());
        let Observation { stage, layer, position, tokens, .. } = o;
        self.spans.push(Span { stage, layer, position, tokens, start, end });
        self.last = end;
    }
}

/// All calls of one operation in a test.
#[derive(Serialize)]
pub struct Operation {
    pub operation: &'static str,
    pub calls: usize,
    /// In all.
    pub seconds: f64,
    /// Of the time of all operations.
    pub time_share: f64,
    /// Bytes of weights and KV cache to be read, and floating-point operations of products; of operations on rows,
    /// whose data are in a cache, neither is counted.
    pub bytes: f64,
    pub flops: f64,
    /// What bounds it, `memory` or `multiply`: that which would take longer. None where nothing is counted, or the limit is not known.
    pub limit: Option<&'static str>,
    /// The time that the limit would allow, of the time taken.
    pub limit_share: Option<f64>,
}

/// The operations of `spans`, in the order of the forward pass; `limit` is what bounds products.
pub fn operations(spans: &[Span], cfg: &Qwen2Config, limit: Option<&Limit>) -> Vec<Operation> {
    let all: f64 = spans.iter().map(|span| (span.end - span.start).as_secs_f64()).sum();
    let mut operations: Vec<Operation> = Vec::new();
    // Spans of one operation may differ in what bounds them, for a last, short step: each counts with its own.
    let mut allowed: Vec<(f64, f64)> = Vec::new();
    for span in spans {
        let Work { bytes, flops } = stage_work(cfg, span.stage, span.position, span.tokens);
        let operation = name(span.stage);
        let i = operations.iter().position(|o| o.operation == operation).unwrap_or_else(|| {
            allowed.push((0.0, 0.0));
            operations.push(Operation {
                operation,
                calls: 0,
                seconds: 0.0,
                time_share: 0.0,
                bytes: 0.0,
                flops: 0.0,
                limit: None,
                limit_share: None,
            });
            operations.len() - 1
        });
        let o = &mut operations[i];
        o.calls += 1;
        o.seconds += (span.end - span.start).as_secs_f64();
        o.bytes += bytes;
        o.flops += flops;
        if let Some(limit) = limit {
            let flop_s = if span.stage == Stage::Attention { limit.attention_flop_s } else { limit.flop_s };
            let (memory, multiply) = (bytes / limit.bytes_s, flops / flop_s);
            if memory > multiply { allowed[i].0 += memory } else { allowed[i].1 += multiply }
        }
    }
    for (o, (memory, multiply)) in operations.iter_mut().zip(allowed) {
        o.time_share = o.seconds / all;
        if limit.is_some() && o.flops > 0.0 {
            o.limit = Some(if memory > multiply { "memory" } else { "multiply" });
            o.limit_share = Some((memory + multiply) / o.seconds);
        }
    }
    operations
}

/// All operations as one. Its share of the limit is the time that their limits would allow one after the other, of the time
/// taken; operations on rows, which have no limit, count as time taken only.
fn total(operations: &[Operation]) -> Operation {
    let sum = |number: fn(&Operation) -> f64| operations.iter().map(number).sum::<f64>();
    let seconds = sum(|o| o.seconds);
    let allowed = sum(|o| o.limit_share.map_or(0.0, |share| share * o.seconds));
    Operation {
        operation: "all",
        calls: operations.iter().map(|o| o.calls).sum(),
        seconds,
        time_share: sum(|o| o.time_share),
        bytes: sum(|o| o.bytes),
        flops: sum(|o| o.flops),
        limit: None,
        limit_share: operations.iter().any(|o| o.limit_share.is_some()).then_some(allowed / seconds),
    }
}

/// Writes the operations of one test as a table.
pub fn write_table(test: &str, operations: &[Operation], out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "\n{test}, operation by operation\n")?;
    writeln!(
        out,
        "| operation  | calls |   ms in all |   time |     GB/s |  GFLOP/s | limit    | share of limit |"
    )?;
    writeln!(
        out,
        "|:-----------|------:|------------:|-------:|---------:|---------:|:---------|---------------:|"
    )?;
    for o in operations.iter().chain([&total(operations)]) {
        let rate =
            |work: f64| if work > 0.0 { format!("{:.1}", work / o.seconds / 1e9) } else { String::new() };
        let share = o.limit_share.map_or(String::new(), |share| format!("{:.1}%", 100.0 * share));
        writeln!(
            out,
            "| {:<10} | {:>5} | {:>11.3} | {:>5.1}% | {:>8} | {:>8} | {:<8} | {share:>14} |",
            o.operation,
            o.calls,
            1e3 * o.seconds,
            100.0 * o.time_share,
            rate(o.bytes),
            rate(o.flops),
            o.limit.unwrap_or_default(),
        )?;
    }
    Ok(())
}

/// Events of Chrome's trace format, for `chrome://tracing` and Perfetto: each test a process of its own.
pub fn trace_events(test: &str, process: usize, spans: &[Span]) -> Vec<Value> {
    let micros = |time: Duration| time.as_nanos() as f64 / 1e3;
    let mut events = vec![json!({
        "name": "process_name", "ph": "M", "pid": process, "tid": 0, "args": { "name": test },
    })];
    events.extend(spans.iter().map(|span| {
        json!({
            "name": name(span.stage), "cat": "forward", "ph": "X", "pid": process, "tid": 0,
            "ts": micros(span.start), "dur": micros(span.end - span.start),
            "args": { "layer": span.layer, "position": span.position, "tokens": span.tokens },
        })
    }));
    events
}

fn name(stage: Stage) -> &'static str {
    match stage {
        Stage::Embed => "embed",
        Stage::AttnNorm => "attn_norm",
        Stage::Qkv => "qkv",
        Stage::Rope => "rope",
        Stage::Attention => "attention",
        Stage::AttnOut => "attn_out",
        Stage::MlpNorm => "mlp_norm",
        Stage::GateUp => "gate_up",
        Stage::Down => "down",
        Stage::FinalNorm => "final_norm",
        Stage::LmHead => "lm_head",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CFG: Qwen2Config = Qwen2Config {
        hidden_size: 64,
        intermediate_size: 128,
        num_layers: 2,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 32,
        vocab_size: 96,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        tie_word_embeddings: true,
    };

    #[test]
    fn calls_of_one_operation_are_added_up() {
        let span = |stage, layer, start, end| Span {
            stage,
            layer,
            position: 0,
            tokens: 1,
            start: Duration::from_secs(start),
            end: Duration::from_secs(end),
        };
        let spans = [span(Stage::Down, 0, 0, 1), span(Stage::AttnNorm, 1, 1, 2), span(Stage::Down, 1, 2, 4)];
        let work = stage_work(&CFG, Stage::Down, 0, 1);
        // At this rate each of the two calls would take half a second.
        let limit = Limit { bytes_s: 2.0 * work.bytes, flop_s: 1e3 * work.flops, attention_flop_s: 1.0 };
        let [down, norm] = &operations(&spans, &CFG, Some(&limit))[..] else { panic!() };
        assert_eq!((down.operation, down.calls, down.seconds, down.time_share), ("down", 2, 3.0, 0.75));
        assert_eq!((down.bytes, down.flops), (2.0 * work.bytes, 2.0 * work.flops));
        assert_eq!((down.limit, down.limit_share), (Some("memory"), Some(1.0 / 3.0)));
        assert_eq!((norm.operation, norm.limit, norm.limit_share), ("attn_norm", None, None));
        let all = total(&operations(&spans, &CFG, Some(&limit)));
        assert_eq!((all.calls, all.seconds, all.time_share), (3, 4.0, 1.0));
        assert_eq!((all.bytes, all.flops, all.limit_share), (down.bytes, down.flops, Some(0.25)));
        let limit = Limit { bytes_s: 1e3 * work.bytes, flop_s: 2.0 * work.flops, attention_flop_s: 1.0 };
        assert_eq!(operations(&spans, &CFG, Some(&limit))[0].limit, Some("multiply"));
        let attention = [span(Stage::Attention, 0, 0, 1)];
        let work = stage_work(&CFG, Stage::Attention, 0, 1);
        let limit = Limit { bytes_s: 1e3 * work.bytes, flop_s: 1.0, attention_flop_s: 4.0 * work.flops };
        assert_eq!(operations(&attention, &CFG, Some(&limit))[0].limit_share, Some(0.25));
    }
}
