//! Text of a growing sequence of tokens, piece by piece.

use crate::Tokenizer;

/// Turns tokens into text as they come: what it gives, put together, is what [`Tokenizer::decode`] gives for all of
/// them at once.
///
/// A token may end inside a character. Its first bytes, at most three, are held back until the rest comes, so the
/// cost of a token does not depend on how much text went before.
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer<'a>,
    skip_special: bool,
    /// Bytes not yet given out: after each call an incomplete character or nothing.
    pending: Vec<u8>,
    piece: String,
}

impl<'a> StreamDecoder<'a> {
    /// Starts a new text. `skip_special` leaves special tokens out of it.
    pub fn new(tokenizer: &'a Tokenizer<'a>, skip_special: bool) -> StreamDecoder<'a> {
        StreamDecoder { tokenizer, skip_special, pending: Vec::new(), piece: String::new() }
    }

    /// Takes the next token and gives the text that it completes: whole characters, often none.
    pub fn push(&mut self, id: u32) -> &str {
        self.tokenizer.append_bytes(id, self.skip_special, &mut self.pending);
        self.piece.clear();
        let mut incomplete = 0;
        for chunk in self.pending.utf8_chunks() {
            self.piece.push_str(chunk.valid());
            incomplete = chunk.invalid().len();
            if incomplete > 0 {
                self.piece.push(char::REPLACEMENT_CHARACTER);
            }
        }
        // The last chunk's invalid bytes may be a character's beginning. Only those are kept, without their U+FFFD.
        if incomplete > 0 && may_continue(&self.pending[self.pending.len() - incomplete..]) {
            self.piece.pop();
            self.pending.drain(..self.pending.len() - incomplete);
        } else {
            self.pending.clear();
        }
        &self.piece
    }

    /// Ends the text: U+FFFD if it stops inside a character, nothing otherwise.
    pub fn finish(self) -> &'static str {
        if self.pending.is_empty() { "" } else { "\u{FFFD}" }
    }
}

/// Whether more bytes could make these a character.
fn may_continue(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|e| e.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, HI, byte};

    #[test]
    fn a_character_comes_out_whole() {
        let tokenizer = testing::tokenizer();
        let mut decoder = StreamDecoder::new(&tokenizer, false);
        let pieces: Vec<String> = "a😀é".bytes().map(|b| decoder.push(byte(b)).to_owned()).collect();
        assert_eq!(pieces, ["a", "", "", "", "😀", "", "é"]);
        assert_eq!(decoder.finish(), "");
    }

    #[test]
    fn broken_bytes_are_replaced_as_soon_as_they_are_known_to_be_broken() {
        let tokenizer = testing::tokenizer();
        let mut decoder = StreamDecoder::new(&tokenizer, false);
        assert_eq!(decoder.push(byte(0xFF)), "\u{FFFD}");
        assert_eq!(decoder.push(byte(0xF0)), "");
        assert_eq!(decoder.push(byte(0x9F)), "");
        assert_eq!(decoder.push(HI), "\u{FFFD}hi");
        assert_eq!(decoder.push(byte(0xE4)), "");
        assert_eq!(decoder.push(byte(0xE4)), "\u{FFFD}");
        assert_eq!(decoder.finish(), "\u{FFFD}");
    }

    #[test]
    fn special_tokens_are_left_out_on_request() {
        let tokenizer = testing::tokenizer();
        let end = tokenizer.token_id("<|end|>").unwrap();
        assert_eq!(StreamDecoder::new(&tokenizer, false).push(end), "<|end|>");
        assert_eq!(StreamDecoder::new(&tokenizer, true).push(end), "");
    }

    #[test]
    fn the_cost_of_a_token_does_not_grow() {
        let tokenizer = testing::tokenizer();
        let mut decoder = StreamDecoder::new(&tokenizer, false);
        for _ in 0..1000 {
            for b in "aé😀\u{FFFF}".bytes().chain([0xFF, 0xE4]) {
                decoder.push(byte(b));
                assert!(decoder.pending.len() <= 3);
            }
        }
    }
}
