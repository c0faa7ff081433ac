//! One answer: prefill what is new, generate, write the text as it comes, keep the times.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mr_cli::{Result, say};
use mruntime::{GenerateOptions, Generated, Numerics, Pool, Sampler, Session, StopReason, session_generate};
use mruntime_text::{StreamDecoder, Tokenizer};

/// Tokens of a prefill step: more would read the weights less often, but these keep the multipliers busy.
pub const BATCH: usize = 512;

/// Generates answers and adds up their times.
pub struct Answerer<'a> {
    session: Session<'a>,
    sampler: Sampler,
    pool: Pool,
    tokenizer: &'a Tokenizer<'a>,
    stop_tokens: Vec<u32>,
    max_new_tokens: usize,
    /// Set from outside to stop the answer.
    stop: Arc<AtomicBool>,
    totals: Totals,
}

/// Of all answers.
#[derive(Default)]
struct Totals {
    /// Tokens of the prompts that were prefilled.
    prefilled: usize,
    prefill: Duration,
    /// Tokens of the prompts that the KV cache held already.
    cached: usize,
    /// Tokens of the answers.
    generated: usize,
    /// Forward passes of decoding.
    decode_steps: usize,
    decode: Duration,
}

impl<'a> Answerer<'a> {
    /// With nothing to stop it but `stop_tokens`, `max_new_tokens` and the context.
    pub fn new(
        session: Session<'a>,
        sampler: Sampler,
        pool: Pool,
        tokenizer: &'a Tokenizer<'a>,
        stop_tokens: Vec<u32>,
        max_new_tokens: usize,
    ) -> Answerer<'a> {
        let (stop, totals) = Default::default();
        Answerer { session, sampler, pool, tokenizer, stop_tokens, max_new_tokens, stop, totals }
    }

    /// Lets `stop` end an answer, until the next one begins.
    pub fn stop_when(&mut self, stop: Arc<AtomicBool>) {
        self.stop = stop;
    }

    /// Begins an answer: from here on, also while its prompt is made, it can be stopped.
    pub fn begin(&self) {
        self.stop.store(false, Ordering::Relaxed);
    }

    /// Writes the answer to `prompt`, the tokens of the whole conversation, and a newline. Returns its tokens; none if
    /// it was stopped before it began.
    pub fn answer(&mut self, prompt: &[u32], out: &mut impl Write) -> Result<Option<Vec<u32>>> {
        let context = self.session.context();
        if prompt.len() > context {
            let tokens = prompt.len();
            return Err(format!(
                "the prompt and what goes before it have {tokens} tokens, the context has room for {context}; \
                 shorten it, begin a new conversation or raise --ctx"
            )
            .into());
        }
        if self.prefill(prompt)?.is_break() {
            return Ok(None);
        }
        let options = GenerateOptions { max_new_tokens: self.max_new_tokens, stop_tokens: &self.stop_tokens };
        let mut decoder = StreamDecoder::new(self.tokenizer, true);
        let mut answer = Vec::new();
        let mut written = Ok(());
        let Answerer { session, sampler, pool, stop, .. } = self;
        let generated = session_generate(session, prompt, sampler, &options, pool, |token| {
            answer.push(token);
            written = write_now(out, decoder.push(token));
            if written.is_err() || stop.load(Ordering::Relaxed) {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        })?;
        written?;
        write_now(out, &format!("{}\n", decoder.finish()))?;
        if generated.reason == StopReason::ContextFull {
            say(format_args!("(the context of {context} tokens is full)"));
        }
        self.totals.add(&generated);
        Ok(Some(answer))
    }

    /// Prefills all but the last batch of what the cache does not hold, batch by batch, so that it can be stopped.
    fn prefill(&mut self, prompt: &[u32]) -> Result<ControlFlow<()>> {
        let Answerer { session, sampler, pool, stop, totals, .. } = self;
        // The last token is computed in any case.
        let mut filled = session.reusable(prompt).min(prompt.len() - 1);
        totals.cached += filled;
        let options = GenerateOptions { max_new_tokens: 0, stop_tokens: &[] };
        while prompt.len() - filled > BATCH {
            filled += BATCH;
            let begin = &prompt[..filled];
            totals
                .add(&session_generate(session, begin, sampler, &options, pool, |_| ControlFlow::Break(()))?);
            if stop.load(Ordering::Relaxed) {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Tells on stderr how fast the answers came, if there were any.
    pub fn print_speed(&self, numerics: Numerics) {
        let Totals { prefilled, prefill, cached, generated, decode_steps, decode } = self.totals;
        if prefilled == 0 {
            return;
        }
        let rate = |n: usize, time: Duration| n as f64 / time.as_secs_f64();
        let mut line = format!("prompt: {prefilled} tokens, {:.1} tokens/s", rate(prefilled, prefill));
        if cached > 0 {
            line += &format!(" ({cached} more were in the KV cache)");
        }
        line += &format!("; generation: {generated} tokens");
        if decode_steps > 0 {
            line += &format!(", {:.1} tokens/s", rate(decode_steps, decode));
        }
        if numerics != Numerics::Exact {
            line += &format!("; {} numerics", numerics.name());
        }
        say(line);
    }
}

impl Totals {
    fn add(&mut self, generated: &Generated) {
        self.prefilled += generated.prompt_tokens;
        self.prefill += generated.prefill;
        self.generated += generated.new_tokens;
        // The first token comes from prefill; after the last one there is a forward pass only if a stop token followed.
        self.decode_steps += match generated.reason {
            StopReason::StopToken(_) => generated.new_tokens,
            _ => generated.new_tokens.saturating_sub(1),
        };
        self.decode += generated.decode;
    }
}

/// Writes and shows it at once.
fn write_now(out: &mut impl Write, text: &str) -> io::Result<()> {
    out.write_all(text.as_bytes())?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use mruntime::{Isa, SamplingOptions};
    use mruntime_tests::{Run, TinyModel, with_model};

    /// Stops the answer when `left` pieces of text have come.
    struct StoppingWriter {
        text: Vec<u8>,
        left: usize,
        stop: Arc<AtomicBool>,
    }

    impl Write for StoppingWriter {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.text.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            self.left = self.left.saturating_sub(1);
            self.stop.fetch_or(self.left == 0, Ordering::Relaxed);
            Ok(())
        }
    }

    #[test]
    fn an_answer_can_be_stopped_and_the_next_one_goes_on() {
        let tokenizer = Tokenizer::from_json(include_bytes!("../tests/fixture/tokenizer.json")).unwrap();
        let (cfg, weights) = TinyModel::named("tied").load();
        let prompt = [100, 101, 102];
        let run = Run::usual();
        let expected = with_model(&cfg, weights.bytes(), 64, run, |mut model| model.generate(&prompt, 10));
        with_model(&cfg, weights.bytes(), 64, run, |model| {
            let session = Session::new(model.cfg, model.weights, model.kv, model.scratch);
            let sampler = Sampler::new(SamplingOptions::GREEDY, 320, Isa::detect()).unwrap();
            let mut answerer = Answerer::new(session, sampler, model.pool, &tokenizer, Vec::new(), 10);
            let stop = Arc::new(AtomicBool::new(false));
            answerer.stop_when(Arc::clone(&stop));
            for tokens in [4, 1, 11] {
                answerer.begin();
                let mut out = StoppingWriter { text: Vec::new(), left: tokens, stop: Arc::clone(&stop) };
                let answer = answerer.answer(&prompt, &mut out).unwrap().unwrap();
                assert_eq!(answer, expected[..tokens.min(10)]);
                let text = String::from_utf8(out.text).unwrap();
                assert_eq!(text, tokenizer.decode(&answer, true) + "\n");
            }
            assert_eq!(answerer.totals.generated, 4 + 1 + 10);

            // Stopped while its prompt is made.
            answerer.begin();
            stop.store(true, Ordering::Relaxed);
            assert_eq!(answerer.answer(&prompt, &mut io::sink()).unwrap().unwrap(), expected[..1]);
        });
    }
}
