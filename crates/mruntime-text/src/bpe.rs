//! Byte-level BPE: the tokens of a word.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use mrt_format::TokenizerSection;

/// Words up to this many bytes are merged by looking through all pairs for the first merge, which is faster for few.
const SHORT: usize = 48;
/// In place of a merge: no two tokens merge, or there are no two. Above every id, so that it comes last.
const NONE: u32 = u32::MAX;

/// Appends the tokens of a word: beginning with single bytes, the pair whose merge has the lowest id is merged, the
/// first of several, as long as there is one. Bytes that have no token become nothing.
pub(crate) fn encode_word(
    tokenizer: &TokenizerSection,
    word: &[u8],
    heap: &mut MergeHeap,
    out: &mut Vec<u32>,
) {
    if word.len() > SHORT {
        return heap.encode(tokenizer, word, out);
    }
    let merge = |left, right| tokenizer.merge(left, right).unwrap_or(NONE);
    let (mut tokens, mut count) = ([0; SHORT], 0);
    for id in word.iter().filter_map(|&byte| tokenizer.byte_token(byte)) {
        tokens[count] = id;
        count += 1;
    }
    // merged[i]: what tokens i and i + 1 merge into.
    let mut merged = [NONE; SHORT];
    for i in 1..count {
        merged[i - 1] = merge(tokens[i - 1], tokens[i]);
    }
    while count > 1 {
        let pairs = &merged[..count - 1];
        let lowest = pairs.iter().copied().fold(NONE, u32::min);
        if lowest == NONE {
            break;
        }
        let at = pairs.iter().position(|&id| id == lowest).unwrap_or_default();
        tokens.copy_within(at + 2..count, at + 1);
        merged.copy_within(at + 1..count - 1, at);
        count -= 1;
        tokens[at] = lowest;
        if at > 0 {
            merged[at - 1] = merge(tokens[at - 1], lowest);
        }
        merged[at] = if at + 1 < count { merge(lowest, tokens[at + 1]) } else { NONE };
    }
    out.extend_from_slice(&tokens[..count]);
}

/// Memory for long words, used again and again.
#[derive(Default)]
pub(crate) struct MergeHeap {
    tokens: Vec<Linked>,
    /// Merges that were possible when they were put in: lowest id, then first place first.
    merges: BinaryHeap<Reverse<Merge>>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Merge {
    id: u32,
    /// Where its first token is.
    at: usize,
}

/// A token and its neighbours' places.
struct Linked {
    /// `NONE` once it is merged into the one before.
    id: u32,
    before: usize,
    /// The number of tokens for the last one.
    next: usize,
}

impl MergeHeap {
    /// Takes O(n log n) for n bytes.
    fn encode(&mut self, tokenizer: &TokenizerSection, word: &[u8], out: &mut Vec<u32>) {
        self.tokens.clear();
        self.merges.clear();
        let ids = word.iter().filter_map(|&byte| tokenizer.byte_token(byte));
        self.tokens.extend(ids.enumerate().map(|(i, id)| Linked {
            id,
            before: i.wrapping_sub(1),
            next: i + 1,
        }));
        for at in 1..self.tokens.len() {
            self.offer(tokenizer, at - 1);
        }
        while let Some(Reverse(Merge { id, at })) = self.merges.pop() {
            // Its tokens may have been merged with others since.
            if self.possible(tokenizer, at) != Some(id) {
                continue;
            }
            let gone = self.tokens[at].next;
            let next = self.tokens[gone].next;
            self.tokens[gone].id = NONE;
            self.tokens[at].id = id;
            self.tokens[at].next = next;
            if let Some(next) = self.tokens.get_mut(next) {
                next.before = at;
            }
            self.offer(tokenizer, self.tokens[at].before);
            self.offer(tokenizer, at);
        }
        out.extend(self.tokens.iter().map(|token| token.id).filter(|&id| id != NONE));
    }

    /// What the token at `at` and the next one merge into.
    fn possible(&self, tokenizer: &TokenizerSection, at: usize) -> Option<u32> {
        let token = self.tokens.get(at)?;
        let next = self.tokens.get(token.next)?;
        if token.id == NONE { None } else { tokenizer.merge(token.id, next.id) }
    }

    fn offer(&mut self, tokenizer: &TokenizerSection, at: usize) {
        if let Some(id) = self.possible(tokenizer, at) {
            self.merges.push(Reverse(Merge { id, at }));
        }
    }
}
