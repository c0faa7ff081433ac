//! Choosing the next token from the logits.

use std::cmp::Ordering;

use mrt_format::GenerationDefaults;
use mrt_kernels::Isa;

use crate::error::Error;

/// How tokens are chosen. The filters apply in Hugging Face's order: repetition penalty, temperature, top-k, top-p
/// (nucleus), min-p.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; 0 chooses the largest (greedy).
    pub temperature: f32,
    /// Only the `top_k` largest logits; 0 for all.
    pub top_k: u32,
    /// Only the smallest set of most probable tokens whose probabilities sum to at least this; 1 for all.
    pub top_p: f32,
    /// Only tokens at least this probable relative to the most probable one; 0 for all.
    pub min_p: f32,
    /// Positive logits of tokens that occurred are divided by this, negative ones multiplied; 1 for none.
    /// (Keskar et al., "CTRL", 2019.)
    pub repetition_penalty: f32,
    /// Where the random numbers start: the same seed, the same choices.
    pub seed: u64,
}

impl SamplingOptions {
    /// The most probable token, always.
    pub const GREEDY: SamplingOptions = SamplingOptions {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        seed: 0,
    };

    /// The defaults that a model came with.
    pub fn from_defaults(defaults: &GenerationDefaults, seed: u64) -> SamplingOptions {
        SamplingOptions {
            temperature: if defaults.do_sample { defaults.temperature } else { 0.0 },
            top_k: defaults.top_k,
            top_p: defaults.top_p,
            min_p: defaults.min_p,
            repetition_penalty: defaults.repetition_penalty,
            seed,
        }
    }

    fn check(&self) -> Result<(), Error> {
        let options = [
            ("temperature", self.temperature, self.temperature >= 0.0, "0 (greedy) or more"),
            ("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0.0, "above 0"),
        ];
        match options.into_iter().find(|(_, value, ok, _)| !(*ok && value.is_finite())) {
            Some((option, value, _, expected)) => Err(Error::Sampling { option, value, expected }),
            None => Ok(()),
        }
    }
}

/// Where the exponential of softmax ends, e^-80, banned tokens are too: what weighs no more is not chosen.
const LEAST_WEIGHT: f32 = 2e-35;

/// A token that may be chosen. Its score is first its logit, then its probability relative to that of the most probable
/// token.
#[derive(Clone, Copy)]
struct Candidate {
    id: u32,
    score: f32,
}

/// The state of sampling: options, random numbers, and the tokens that have occurred.
pub struct Sampler {
    options: SamplingOptions,
    isa: Isa,
    random: u64,
    /// Tokens that have occurred, once each, and whether a token is among them.
    seen: Vec<u32>,
    is_seen: Vec<bool>,
    /// Room for one candidate and one weight a token, so that sampling allocates nothing.
    candidates: Vec<Candidate>,
    weights: Vec<f32>,
}

impl Sampler {
    /// A sampler for logits over `vocab` tokens.
    ///
    /// # Errors
    /// When an option is outside its range.
    pub fn new(options: SamplingOptions, vocab: usize, isa: Isa) -> Result<Sampler, Error> {
        options.check()?;
        Ok(Sampler {
            options,
            isa,
            random: options.seed,
            seen: Vec::with_capacity(vocab),
            is_seen: vec![false; vocab],
            candidates: Vec::with_capacity(vocab),
            weights: vec![0.0; vocab],
        })
    }

    /// The options that it was made with.
    pub fn options(&self) -> SamplingOptions {
        self.options
    }

    /// Notes that `token` has occurred, for the repetition penalty.
    pub fn observe(&mut self, token: u32) {
        if let Some(seen) = self.is_seen.get_mut(token as usize)
            && !std::mem::replace(seen, true)
        {
            self.seen.push(token);
        }
    }

    /// Forgets the tokens that have occurred.
    pub fn forget(&mut self) {
        for token in self.seen.drain(..) {
            self.is_seen[token as usize] = false;
        }
    }
}

/// Chooses the next token. `logits` are changed by the repetition penalty. A logit of negative infinity is never
/// chosen while there is another.
///
/// # Panics
/// If `logits` has another length than the sampler was made for.
pub fn sample(sampler: &mut Sampler, logits: &mut [f32]) -> u32 {
    assert_eq!(logits.len(), sampler.weights.len());
    let options = sampler.options;
    let penalty = options.repetition_penalty;
    for &token in &sampler.seen {
        let logit = &mut logits[token as usize];
        *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
    }
    if options.temperature == 0.0 || options.top_k == 1 {
        return argmax(logits);
    }
    let Sampler { candidates, weights, isa, .. } = sampler;
    let per_temperature = 1.0 / options.temperature;
    let top_k = options.top_k as usize;
    let few = (1..logits.len()).contains(&top_k);
    let best = if few {
        largest(logits, top_k, candidates);
        candidates.first().map_or(0, |c| c.id)
    } else {
        argmax(logits)
    };
    // Infinite, by itself or divided by a small temperature, it leaves nothing to the others; or all are banned.
    if !(logits[best as usize] * per_temperature).is_finite() {
        return best;
    }
    let total = if few {
        let weights = &mut weights[..candidates.len()];
        for (weight, c) in weights.iter_mut().zip(candidates.iter()) {
            *weight = c.score * per_temperature;
        }
        let total = mrt_kernels::softmax(*isa, weights);
        for (weight, c) in weights.iter().zip(candidates.iter_mut()) {
            c.score = *weight;
        }
        candidates.retain(|c| c.score >= options.min_p);
        total
    } else {
        mrt_kernels::scale(*isa, logits, per_temperature, weights);
        let total = mrt_kernels::softmax(*isa, weights);
        // All below the floor together are less than what a nucleus leaves out.
        let floor = (1.0 - options.top_p) * total / logits.len() as f32;
        let floor = floor.max(options.min_p).max(LEAST_WEIGHT);
        candidates.clear();
        each_above(weights, floor.next_down(), |id, score, floor| {
            candidates.push(Candidate { id: id as u32, score });
            floor
        });
        total
    };
    if options.top_p < 1.0 {
        keep_nucleus(candidates, f64::from(options.top_p) * f64::from(total));
    }

    let total: f64 = candidates.iter().map(|c| f64::from(c.score)).sum();
    let mut left = f64::from(next_random(&mut sampler.random)) * total;
    let chosen = candidates.iter().find(|c| {
        left -= f64::from(c.score);
        left < 0.0
    });
    // None by rounding only.
    chosen.map_or(best, |c| c.id)
}

/// The first of the largest logits.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    each_above(logits, f32::NEG_INFINITY, |id, logit, _| {
        best = id as u32;
        logit
    });
    best
}

/// Calls `f(i, value, threshold)` for each value above a threshold, in order; `f` returns the threshold from there on.
fn each_above(values: &[f32], mut threshold: f32, mut f: impl FnMut(usize, f32, f32) -> f32) {
    // Of most blocks only the maximum is looked at, which takes vector instructions.
    const BLOCK: usize = 128;
    const LANES: usize = 16;
    for (start, block) in (0..).step_by(BLOCK).zip(values.chunks(BLOCK)) {
        let (vectors, rest) = block.as_chunks::<LANES>();
        let mut max = [f32::NEG_INFINITY; LANES];
        for vector in vectors {
            for (max, &x) in max.iter_mut().zip(vector) {
                *max = if x > *max { x } else { *max };
            }
        }
        if max.iter().chain(rest).any(|&x| x > threshold) {
            for (i, &x) in (start..).zip(block) {
                if x > threshold {
                    threshold = f(i, x, threshold);
                }
            }
        }
    }
}

/// Larger scores first, then smaller ids.
fn rank(a: &Candidate, b: &Candidate) -> Ordering {
    b.score.total_cmp(&a.score).then(a.id.cmp(&b.id))
}

/// The `k` largest logits in order of rank, in one pass: once there are `k`, only what beats the k-th is kept.
fn largest(logits: &[f32], k: usize, candidates: &mut Vec<Candidate>) {
    candidates.clear();
    let k = k.min(logits.len());
    let room = (2 * k).max(256).min(logits.len());
    each_above(logits, f32::NEG_INFINITY, |id, logit, threshold| {
        candidates.push(Candidate { id: id as u32, score: logit });
        if candidates.len() < room {
            return threshold;
        }
        keep_best(candidates, k);
        candidates[k - 1].score
    });
    keep_best(candidates, k);
    candidates.sort_unstable_by(rank);
}

/// Keeps the `k` candidates of highest rank, in any order.
fn keep_best(candidates: &mut Vec<Candidate>, k: usize) {
    if candidates.len() > k {
        candidates.select_nth_unstable_by(k - 1, rank);
        candidates.truncate(k);
    }
}

/// Keeps the fewest candidates whose scores, all of 0 to 1, sum to at least `mass`; of equal ones the first.
///
/// Such floats are in order of their bits. So the smallest score to keep is found digit by digit, by sums over the
/// scores that share the digits found so far.
fn keep_nucleus(candidates: &mut Vec<Candidate>, mass: f64) {
    const DIGIT: u32 = 10;
    let mut left = mass;
    let mut found = 0;
    for shift in [2 * DIGIT, DIGIT, 0] {
        let mut sums = [0.0; 1 << DIGIT];
        for c in &*candidates {
            let bits = c.score.to_bits();
            if (bits ^ found) >> (shift + DIGIT) == 0 {
                sums[(bits >> shift) as usize % sums.len()] += f64::from(c.score);
            }
        }
        let mut digit = sums.len() - 1;
        while digit > 0 && sums[digit] < left {
            left -= sums[digit];
            digit -= 1;
        }
        found |= (digit as u32) << shift;
    }
    let least = f32::from_bits(found);
    candidates.retain(|c| {
        let keep = c.score > least || c.score == least && left > 0.0;
        left -= if c.score == least { f64::from(least) } else { 0.0 };
        keep
    });
}

/// A number in 0 .. 1 from SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators",
/// 2014). It is written out here because a seed must give the same text with every version of every dependency.
fn next_random(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    (z >> 40) as f32 / (1 << 24) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(options: SamplingOptions, vocab: usize) -> Sampler {
        Sampler::new(options, vocab, Isa::PORTABLE).unwrap()
    }

    /// How often each token is chosen in `n` draws.
    fn counts(options: SamplingOptions, logits: &[f32], n: usize) -> Vec<usize> {
        let mut sampler = sampler(options, logits.len());
        let mut counts = vec![0; logits.len()];
        for _ in 0..n {
            counts[sample(&mut sampler, &mut logits.to_vec()) as usize] += 1;
        }
        counts
    }

    const SAMPLE: SamplingOptions = SamplingOptions { temperature: 1.0, seed: 5, ..SamplingOptions::GREEDY };

    /// Logits of the probabilities 1/2, 1/4, 1/8, 1/8, not in order.
    fn quarters() -> [f32; 4] {
        [0.125f32.ln(), 0.5f32.ln(), 0.125f32.ln(), 0.25f32.ln()]
    }

    #[test]
    fn greedy_takes_the_first_largest() {
        let mut logits = [1.0, 3.0, -2.0, 3.0];
        assert_eq!(sample(&mut sampler(SamplingOptions::GREEDY, 4), &mut logits), 1);
    }

    #[test]
    fn frequencies_follow_probabilities() {
        let counts = counts(SAMPLE, &quarters(), 40_000);
        for (count, p) in counts.iter().zip([0.125, 0.5, 0.125, 0.25]) {
            let expected = 40_000.0 * p;
            // Five standard deviations.
            assert!((*count as f64 - expected).abs() < 5.0 * (expected * (1.0 - p)).sqrt(), "{counts:?}");
        }
    }

    #[test]
    fn temperature_sharpens_and_flattens() {
        let cold = counts(SamplingOptions { temperature: 0.1, ..SAMPLE }, &quarters(), 1000);
        assert!(cold[1] > 990, "{cold:?}");
        let hot = counts(SamplingOptions { temperature: 100.0, ..SAMPLE }, &quarters(), 4000);
        assert!(hot.iter().all(|&n| n > 800), "{hot:?}");
    }

    #[test]
    fn filters_exclude_what_they_should() {
        let excluded = |options: SamplingOptions| {
            let counts = counts(options, &quarters(), 4000);
            counts.iter().map(|&n| n == 0).collect::<Vec<_>>()
        };
        assert_eq!(excluded(SamplingOptions { top_k: 2, ..SAMPLE }), [true, false, true, false]);
        // Of equals the smaller id is kept.
        assert_eq!(excluded(SamplingOptions { top_k: 3, ..SAMPLE }), [false, false, true, false]);
        assert_eq!(excluded(SamplingOptions { top_p: 0.5, ..SAMPLE }), [true, false, true, true]);
        assert_eq!(excluded(SamplingOptions { top_p: 0.7, ..SAMPLE }), [true, false, true, false]);
        assert_eq!(excluded(SamplingOptions { top_p: 0.8, ..SAMPLE }), [false, false, true, false]);
        assert_eq!(excluded(SamplingOptions { min_p: 0.4, ..SAMPLE }), [true, false, true, false]);
        assert_eq!(excluded(SamplingOptions { top_k: 3, min_p: 0.4, ..SAMPLE }), [true, false, true, false]);
        // Top-p looks at the probabilities that top-k has left: 2/3 and 1/3.
        assert_eq!(excluded(SamplingOptions { top_k: 2, top_p: 0.6, ..SAMPLE }), [true, false, true, true]);
    }

    #[test]
    fn banned_tokens_are_never_chosen() {
        let mut logits = vec![f32::NEG_INFINITY; 1000];
        logits[700] = -3.0;
        let top_k = SamplingOptions { top_k: 50, ..SAMPLE };
        for options in [SAMPLE, top_k, SamplingOptions { top_p: 0.9, ..SAMPLE }] {
            assert_eq!(counts(options, &logits, 100)[700], 100);
        }
        // Nor do they count: this nucleus is one of two.
        logits[800] = -2.0;
        assert_eq!(counts(SamplingOptions { top_p: 0.7, ..top_k }, &logits, 100)[800], 100);
        // The seed's first random number is 0, which takes the first candidate.
        let first = SamplingOptions { seed: 17_885_559_969_949_501_885, ..SAMPLE };
        assert_eq!(sample(&mut sampler(first, 1000), &mut logits.clone()), 700);
        for options in [SAMPLE, top_k, SamplingOptions { min_p: 0.1, ..SAMPLE }] {
            assert_eq!(counts(options, &[f32::NEG_INFINITY; 1000], 20)[0], 20);
            assert_eq!(counts(options, &[f32::NAN; 1000], 20)[0], 20);
        }
    }

    #[test]
    fn an_infinite_logit_is_chosen() {
        let mut logits = vec![0.0; 1000];
        logits[700] = f32::INFINITY;
        let finite: Vec<f32> = (0..1000).map(|i| if i == 700 { 20.0 } else { 1.0 }).collect();
        for options in
            [SAMPLE, SamplingOptions { top_k: 50, ..SAMPLE }, SamplingOptions { top_p: 0.9, ..SAMPLE }]
        {
            assert_eq!(counts(options, &logits, 20)[700], 20);
            // Divided by such a temperature every logit is infinite.
            assert_eq!(counts(SamplingOptions { temperature: 1e-38, ..options }, &finite, 20)[700], 20);
        }
    }

    #[test]
    fn largest_equals_a_full_sort() {
        let mut state = 3;
        for n in [1, 5, 100, 3000] {
            // Few distinct values, so that there are ties.
            let logits: Vec<f32> = (0..n).map(|_| (next_random(&mut state) * 50.0).floor()).collect();
            let mut all: Vec<_> = logits
                .iter()
                .enumerate()
                .map(|(id, &logit)| Candidate { id: id as u32, score: logit })
                .collect();
            all.sort_by(rank);
            for k in [1, 2, 40, 64, 256, 5000] {
                let mut found = Vec::with_capacity(n);
                largest(&logits, k, &mut found);
                let ids = |c: &[Candidate]| c.iter().map(|c| c.id).collect::<Vec<_>>();
                assert_eq!(ids(&found), ids(&all[..k.min(n)]), "n {n} k {k}");
                assert!(found.capacity() == n);
            }
        }
    }

    #[test]
    fn argmax_is_the_first_maximum() {
        let mut state = 4;
        for n in [1, 15, 16, 17, 127, 128, 129, 5000] {
            let mut logits: Vec<f32> = (0..n).map(|_| (next_random(&mut state) * 50.0).floor()).collect();
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let first = logits.iter().position(|&x| x == max).unwrap();
            assert_eq!(argmax(&logits), first as u32, "{n}");
            logits[first] = f32::NAN;
            logits.push(51.0);
            assert_eq!(argmax(&logits), n as u32);
        }
        assert_eq!(argmax(&[f32::NEG_INFINITY; 3]), 0);
    }

    #[test]
    fn a_nucleus_is_the_shortest_beginning_of_all_in_order() {
        let mut state = 5;
        for n in [1, 64, 65, 5000] {
            // Few distinct values, so that there are ties, and many.
            for steps in [20.0, 1e9] {
                let all: Vec<_> = (0..n)
                    .map(|id| (id, (next_random(&mut state) * steps).floor() / steps))
                    .map(|(id, x)| Candidate { id, score: (10.0 * x - 10.0).exp() })
                    .collect();
                let mut sorted = all.clone();
                sorted.sort_by(rank);
                let total: f64 = sorted.iter().map(|c| f64::from(c.score)).sum();
                for p in [0.01, 0.3, 0.9, 0.999, 1.001] {
                    let mut found = all.clone();
                    keep_nucleus(&mut found, p * total);
                    let mut left = p * total;
                    let expected = sorted.iter().take_while(|c| {
                        let more = left > 0.0;
                        left -= f64::from(c.score);
                        more
                    });
                    let mut expected: Vec<_> = expected.map(|c| c.id).collect();
                    expected.sort_unstable();
                    let found: Vec<_> = found.iter().map(|c| c.id).collect();
                    assert_eq!(found, expected, "n {n} steps {steps} p {p}");
                }
            }
        }
    }

    #[test]
    fn a_wide_nucleus_is_found_whole() {
        // All equal: a nucleus of 0.9 has 900 of 1000 tokens.
        let counts = counts(SamplingOptions { top_p: 0.9, ..SAMPLE }, &[1.0; 1000], 50_000);
        assert!(counts[..900].iter().all(|&n| n > 0) && counts[901..].iter().all(|&n| n == 0));
    }

    #[test]
    fn repetition_is_penalised_once_a_token() {
        let mut sampler = sampler(SamplingOptions { repetition_penalty: 2.0, ..SamplingOptions::GREEDY }, 3);
        sampler.observe(0);
        sampler.observe(0);
        sampler.observe(2);
        let mut logits = [4.0, 1.5, -1.0];
        assert_eq!(sample(&mut sampler, &mut logits), 0);
        assert_eq!(logits, [2.0, 1.5, -2.0]);
        sampler.forget();
        assert_eq!(sample(&mut sampler, &mut logits), 0);
        assert_eq!(logits, [2.0, 1.5, -2.0]);
    }

    #[test]
    fn a_penalty_divides_with_one_rounding() {
        let options = SamplingOptions { repetition_penalty: 1.1, ..SamplingOptions::GREEDY };
        for i in 0..1000 {
            let x = 1.0 + i as f32 / 64.0;
            let mut sampler = sampler(options, 1);
            sampler.observe(0);
            let mut logits = [x];
            sample(&mut sampler, &mut logits);
            assert_eq!(logits, [x / 1.1]);
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_choices() {
        let draw = |seed| {
            let mut sampler = sampler(SamplingOptions { seed, ..SAMPLE }, 4);
            (0..64).map(|_| sample(&mut sampler, &mut quarters())).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn options_outside_their_range_are_named() {
        let error = |options| Sampler::new(options, 4, Isa::PORTABLE).err().unwrap().to_string();
        assert!(error(SamplingOptions { top_p: 2.0, ..SAMPLE }).contains("top_p is 2"));
        assert!(error(SamplingOptions { temperature: -1.0, ..SAMPLE }).contains("temperature is -1"));
        assert!(error(SamplingOptions { min_p: f32::NAN, ..SAMPLE }).contains("min_p is NaN"));
        assert!(
            error(SamplingOptions { repetition_penalty: 0.0, ..SAMPLE }).contains("repetition_penalty is 0")
        );
    }
}
