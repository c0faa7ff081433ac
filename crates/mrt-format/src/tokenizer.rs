//! The `tokenizer` section: a byte-level BPE tokenizer that is used as it lies in the file.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::FormatError;

/// Name of the section with a [`TokenizerSection`].
pub const TOKENIZER: &str = "tokenizer";

/// Class of letters (general category L).
pub const CLASS_LETTER: u8 = 1;
/// Class of numbers (general category N).
pub const CLASS_NUMBER: u8 = 2;
/// Class of white space (property White_Space).
pub const CLASS_SPACE: u8 = 4;
/// Class of the characters that [`DigitSplit`] sets apart.
pub const CLASS_DIGIT: u8 = 8;
/// Class of the characters of words (`\w` of Unicode's regular expressions).
pub const CLASS_WORD: u8 = 16;
/// Class of the characters that NFC leaves alone behind any character, and that start a new composition.
pub const CLASS_NFC_INERT: u8 = 32;

/// Most ids of a tokenizer.
pub const MAX_TOKENS: u32 = SPECIAL_TEXT;
/// Longest text of a token that is no merge, in bytes.
pub const MAX_TOKEN_TEXT: usize = 255;

/// `left` of a token that is a text and special, plus the text's length.
pub(crate) const SPECIAL_TEXT: u32 = 0xff_fe00;
/// `left` of a token that is a text, plus its length.
pub(crate) const TEXT: u32 = 0xff_ff00;
/// Characters of a block of the class table.
pub(crate) const CLASS_BLOCK: usize = 256;
/// Blocks of characters in Unicode.
pub(crate) const CLASS_INDEX: usize = 0x11_0000 / CLASS_BLOCK;
/// Parts of a token that wait while an earlier one is written.
const MAX_DEPTH: usize = 256;
/// Parts of a token, merges included, that are looked at.
const MAX_PARTS: usize = 4096;
/// An entry of `byte_tokens` that names no token.
pub(crate) const NO_TOKEN: u32 = u32::MAX;

pub(crate) const FLAG_NFC: u32 = 1;
pub(crate) const ADDED_LSTRIP: u16 = 1;
pub(crate) const ADDED_RSTRIP: u16 = 2;
pub(crate) const ADDED_SINGLE_WORD: u16 = 4;

/// How a text is split into the words that merges do not cross: the number of a regular expression of
/// `format-spec.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WordSplit {
    /// GPT-2's.
    Gpt2 = 1,
    /// Qwen2's: numbers are one digit long.
    Qwen2 = 2,
    /// Llama 3's: as Qwen2's, but with numbers of up to three digits.
    Llama3 = 3,
}

/// What is done with digits before words are split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DigitSplit {
    /// Nothing.
    None = 0,
    /// Each stands alone.
    Each = 1,
    /// Each run of them stands alone.
    Runs = 2,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawTokenizer {
    pub(crate) flags: U32,
    pub(crate) word_split: U32,
    pub(crate) digit_split: U32,
    pub(crate) token_count: U32,
    pub(crate) added_count: U32,
    pub(crate) normalized_count: U32,
    pub(crate) class_blocks: U32,
    pub(crate) bucket_count: U32,
    pub(crate) slot_count: U32,
    pub(crate) salt: U32,
    pub(crate) text_bytes: U32,
    pub(crate) reserved: [u8; 20],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawAdded {
    pub(crate) id: U32,
    pub(crate) offset: U32,
    pub(crate) bytes: U16,
    pub(crate) flags: U16,
}

/// An id's two numbers of 24 bits.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawToken {
    pub(crate) left: [u8; 3],
    pub(crate) right: [u8; 3],
}

/// What an id stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token<'a> {
    /// Two tokens, one after the other, that a merge makes one of.
    Merge {
        /// The first; below the id.
        left: u32,
        /// The second; below the id.
        right: u32,
    },
    /// Bytes, which need not be UTF-8: a single byte, or a token that no merge makes.
    Text {
        /// At most 255.
        bytes: &'a [u8],
        /// Whether it is left out of a text on demand.
        special: bool,
    },
}

/// A token that is found in a text before the text is split into words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddedToken<'a> {
    /// Its id.
    pub id: u32,
    /// The text that it is found by.
    pub text: &'a [u8],
    /// Whether white space before it belongs to it.
    pub lstrip: bool,
    /// Whether white space behind it belongs to it.
    pub rstrip: bool,
    /// Whether it is found only where no word's character is beside it.
    pub single_word: bool,
}

/// Added tokens in ascending order of their texts. Those whose id is none of the tokenizer's are as if they were not
/// there.
#[derive(Clone, Copy)]
pub struct AddedTokens<'a> {
    tokens: &'a [RawAdded],
    texts: &'a [u8],
    token_count: u32,
}

/// A view of the content of the `tokenizer` section.
///
/// Making one takes nanoseconds: it compares lengths and copies nothing. What the arrays hold is checked where it is
/// used, so that damaged or hostile content gives wrong tokens, never a panic, an endless loop or an access outside the
/// section. [`check`](Self::check) looks at all of it.
#[derive(Clone, Copy)]
pub struct TokenizerSection<'a> {
    nfc: bool,
    word_split: WordSplit,
    digit_split: DigitSplit,
    salt: u32,
    class_index: &'a [u8; CLASS_INDEX],
    class_blocks: &'a [[u8; CLASS_BLOCK]],
    byte_tokens: &'a [U32; 256],
    added: AddedTokens<'a>,
    normalized: AddedTokens<'a>,
    seeds: &'a [U16],
    slots: &'a [U32],
    tokens: &'a [RawToken],
    texts: &'a [u8],
}

impl<'a> TokenizerSection<'a> {
    /// Reads the header.
    ///
    /// # Errors
    /// [`FormatError::BadTokenizer`] if a field of the header has a value that it may not have, or the lengths do not
    /// add up to that of the section.
    pub fn new(content: &'a [u8]) -> Result<TokenizerSection<'a>, FormatError> {
        let bytes = content.len() as u64;
        let Ok((raw, _)) = RawTokenizer::ref_from_prefix(content) else {
            return Err(bad("bytes", bytes, "at least 64"));
        };
        if raw.flags.get() & !FLAG_NFC != 0 {
            return Err(bad("flags", raw.flags.get().into(), "0 or 1"));
        }
        let word_split = match raw.word_split.get() {
            1 => WordSplit::Gpt2,
            2 => WordSplit::Qwen2,
            3 => WordSplit::Llama3,
            other => return Err(bad("word_split", other.into(), "1 to 3")),
        };
        let digit_split = match raw.digit_split.get() {
            0 => DigitSplit::None,
            1 => DigitSplit::Each,
            2 => DigitSplit::Runs,
            other => return Err(bad("digit_split", other.into(), "0 to 2")),
        };
        if raw.token_count > MAX_TOKENS {
            return Err(bad("token_count", raw.token_count.get().into(), "at most 16776704"));
        }
        if !(1..=256).contains(&raw.class_blocks.get()) {
            return Err(bad("class_blocks", raw.class_blocks.get().into(), "1 to 256"));
        }
        if let Some(byte) = raw.reserved.iter().find(|&&byte| byte != 0) {
            return Err(bad("reserved", (*byte).into(), "0"));
        }
        arrays(content, raw, word_split, digit_split)
            .ok_or_else(|| bad("bytes", bytes, "what the header's counts make"))
    }

    /// Whether texts are brought into NFC first.
    pub fn nfc(&self) -> bool {
        self.nfc
    }

    /// How texts are split into words.
    pub fn word_split(&self) -> WordSplit {
        self.word_split
    }

    /// What is done with digits before.
    pub fn digit_split(&self) -> DigitSplit {
        self.digit_split
    }

    /// One more than the highest id.
    pub fn token_count(&self) -> u32 {
        self.tokens.len() as u32
    }

    /// The added tokens that are found in a text as it is given.
    pub fn added(&self) -> AddedTokens<'a> {
        self.added
    }

    /// The added tokens that are found in what is left of it, in NFC if that is asked for.
    pub fn normalized_added(&self) -> AddedTokens<'a> {
        self.normalized
    }

    /// The classes of a character, as a sum of `CLASS_` constants.
    #[inline]
    pub fn classes(&self, c: char) -> u8 {
        let block = self.class_index.get(c as usize / CLASS_BLOCK).copied().unwrap_or_default();
        self.class_blocks.get(usize::from(block)).map_or(0, |block| block[c as usize % CLASS_BLOCK])
    }

    /// The token of a single byte; `None` if there is none, and the byte becomes nothing.
    #[inline]
    pub fn byte_token(&self, byte: u8) -> Option<u32> {
        let id = self.byte_tokens[usize::from(byte)].get();
        (id < self.token_count()).then_some(id)
    }

    /// The token that two neighbours merge into; the lower, the sooner.
    #[inline]
    pub fn merge(&self, left: u32, right: u32) -> Option<u32> {
        let hash = pair_hash(left, right, self.salt);
        let seed = self.seeds.get(scale(hash as u32, self.seeds.len()))?.get();
        let slot = self.slots.get(slot_of(hash, seed, self.slots.len()))?.get();
        if slot >> 24 != hash as u32 & 0xff {
            return None;
        }
        let id = slot & 0xff_ffff;
        let token = self.tokens.get(id as usize)?;
        let is_made = token.left == to_24(left) && token.right == to_24(right);
        (is_made && left < id && right < id).then_some(id)
    }

    /// What an id stands for; `None` if it is none, or its entry is not valid.
    #[inline]
    pub fn token(&self, id: u32) -> Option<Token<'a>> {
        let token = self.tokens.get(id as usize)?;
        let (left, right) = (from_24(token.left), from_24(token.right));
        if left >= SPECIAL_TEXT {
            let bytes = self.texts.get(right as usize..)?.get(..(left & 0xff) as usize)?;
            return Some(Token::Text { bytes, special: left < TEXT });
        }
        (left < id && right < id).then_some(Token::Merge { left, right })
    }

    /// Whether a token is left out of a text on demand.
    pub fn is_special(&self, id: u32) -> bool {
        matches!(self.token(id), Some(Token::Text { special: true, .. }))
    }

    /// Appends the bytes of a token, which need not be UTF-8; nothing if there is no such token.
    pub fn append_bytes(&self, id: u32, out: &mut Vec<u8>) {
        self.append_parts(id, out);
    }

    /// Appends the bytes of a token. False if it is not valid or has too many parts; some of them may be missing then.
    fn append_parts(&self, id: u32, out: &mut Vec<u8>) -> bool {
        let mut waiting = [id; MAX_DEPTH];
        let mut count = 1;
        for _ in 0..MAX_PARTS {
            count -= 1;
            match self.token(waiting[count]) {
                Some(Token::Text { bytes, .. }) => out.extend_from_slice(bytes),
                Some(Token::Merge { left, right }) if count + 2 <= MAX_DEPTH => {
                    waiting[count] = right;
                    waiting[count + 1] = left;
                    count += 2;
                }
                _ => return false,
            }
            if count == 0 {
                return true;
            }
        }
        false
    }

    /// Checks all arrays: what a writer promises, and a reader need not rely on.
    ///
    /// # Errors
    /// [`FormatError::BadTokenizer`] with the first entry that breaks a rule.
    pub fn check(&self) -> Result<(), FormatError> {
        let blocks = self.class_blocks.len();
        if let Some(block) = self.class_index.iter().find(|&&block| usize::from(block) >= blocks) {
            return Err(bad("class_index", (*block).into(), "below class_blocks"));
        }
        let no_token = |id: u32| id >= self.token_count();
        for id in self.byte_tokens.iter().map(|id| id.get()).filter(|&id| id != NO_TOKEN) {
            if no_token(id) {
                return Err(bad("byte_tokens", id.into(), "below token_count, or 4294967295"));
            }
        }
        for added in [self.added, self.normalized] {
            let mut before: &[u8] = b"";
            for (i, raw) in added.tokens.iter().enumerate() {
                let token = added.get(i);
                if no_token(token.id) {
                    return Err(bad("added id", token.id.into(), "below token_count"));
                }
                if raw.flags.get() > (ADDED_LSTRIP | ADDED_RSTRIP | ADDED_SINGLE_WORD) {
                    return Err(bad("added flags", raw.flags.get().into(), "at most 7"));
                }
                let valid = token.text.len() == usize::from(raw.bytes.get())
                    && token.text > before
                    && std::str::from_utf8(token.text).is_ok();
                if !valid {
                    let expected = "that of a text in UTF-8 that is greater than the one before";
                    return Err(bad("added offset", raw.offset.get().into(), expected));
                }
                before = token.text;
            }
        }
        let mut bytes = Vec::new();
        for id in 0..self.token_count() {
            bytes.clear();
            if !self.append_parts(id, &mut bytes) {
                return Err(bad("token", id.into(), "a text, or a merge of lower ids of at most 4096 parts"));
            }
            if let Some(Token::Merge { left, right }) = self.token(id)
                && self.merge(left, right) != Some(id)
            {
                return Err(bad("token", id.into(), "what its own merge makes"));
            }
        }
        Ok(())
    }
}

/// The arrays behind the header; `None` if they are longer or shorter than the section.
fn arrays<'a>(
    content: &'a [u8],
    raw: &RawTokenizer,
    word_split: WordSplit,
    digit_split: DigitSplit,
) -> Option<TokenizerSection<'a>> {
    fn split<'a, T: FromBytes + Immutable + KnownLayout + Unaligned>(
        rest: &mut &'a [u8],
        count: usize,
    ) -> Option<&'a [T]> {
        let (array, behind) = <[T]>::ref_from_prefix_with_elems(rest, count).ok()?;
        *rest = behind;
        Some(array)
    }
    let count = |field: U32| field.get() as usize;
    let mut rest = content.get(size_of::<RawTokenizer>()..)?;
    let class_index = split(&mut rest, CLASS_INDEX)?.first_chunk()?;
    let class_blocks = split(&mut rest, count(raw.class_blocks))?;
    let byte_tokens = split(&mut rest, 256)?.first_chunk()?;
    let added = split(&mut rest, count(raw.added_count))?;
    let normalized = split(&mut rest, count(raw.normalized_count))?;
    let seeds = split(&mut rest, count(raw.bucket_count))?;
    let slots = split(&mut rest, count(raw.slot_count))?;
    let tokens = split(&mut rest, count(raw.token_count))?;
    let texts = split(&mut rest, count(raw.text_bytes))?;
    let token_count = raw.token_count.get();
    rest.is_empty().then_some(TokenizerSection {
        nfc: raw.flags.get() & FLAG_NFC != 0,
        word_split,
        digit_split,
        salt: raw.salt.get(),
        class_index,
        class_blocks,
        byte_tokens,
        added: AddedTokens { tokens: added, texts, token_count },
        normalized: AddedTokens { tokens: normalized, texts, token_count },
        seeds,
        slots,
        tokens,
        texts,
    })
}

impl<'a> AddedTokens<'a> {
    /// All of them, in ascending order of their texts.
    pub fn iter(&self) -> impl Iterator<Item = AddedToken<'a>> + use<'a> {
        let tokens = *self;
        (0..tokens.tokens.len()).filter(move |&i| tokens.has_id(i)).map(move |i| tokens.get(i))
    }

    /// The longest one that `text` begins with.
    pub fn longest_prefix(&self, text: &[u8]) -> Option<AddedToken<'a>> {
        let mut range = 0..self.tokens.len();
        let mut longest = None;
        // All tokens of the range begin with the first `common` bytes of the text.
        for common in 0.. {
            if !range.is_empty() && common > 0 && self.text(range.start).len() == common {
                longest = Some(range.start).filter(|&i| self.has_id(i)).or(longest);
                range.start += 1;
            }
            let Some(byte) = text.get(common) else { break };
            let next = |i: usize| self.text(i).get(common);
            let below = partition_point(range.clone(), |i| next(i) < Some(byte));
            range = below..partition_point(below..range.end, |i| next(i) <= Some(byte));
            if range.is_empty() {
                break;
            }
        }
        // In a damaged section the order may be wrong.
        longest.map(|i| self.get(i)).filter(|token| text.starts_with(token.text))
    }

    fn has_id(&self, i: usize) -> bool {
        self.tokens[i].id.get() < self.token_count
    }

    fn text(&self, i: usize) -> &'a [u8] {
        let RawAdded { offset, bytes, .. } = self.tokens[i];
        let text = self.texts.get(offset.get() as usize..).and_then(|t| t.get(..usize::from(bytes.get())));
        text.unwrap_or_default()
    }

    fn get(&self, i: usize) -> AddedToken<'a> {
        let RawAdded { id, flags, .. } = self.tokens[i];
        let has = |flag: u16| flags.get() & flag != 0;
        AddedToken {
            id: id.get(),
            text: self.text(i),
            lstrip: has(ADDED_LSTRIP),
            rstrip: has(ADDED_RSTRIP),
            single_word: has(ADDED_SINGLE_WORD),
        }
    }
}

/// The first number of the range for which `is_before` does not hold, as `slice::partition_point`.
fn partition_point(range: std::ops::Range<usize>, is_before: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (range.start, range.end);
    while low < high {
        let middle = low + (high - low) / 2;
        if is_before(middle) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

/// SplitMix64's mixing of the pair and the salt.
pub(crate) fn pair_hash(left: u32, right: u32, salt: u32) -> u64 {
    let mut z = u64::from(left) | u64::from(right) << 24 | u64::from(salt) << 48;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d049bb133111eb);
    z ^ (z >> 31)
}

/// The slot of a pair, given its bucket's seed.
pub(crate) fn slot_of(hash: u64, seed: u16, slots: usize) -> usize {
    let x = (hash ^ u64::from(seed).wrapping_mul(0x9e3779b97f4a7c15)).wrapping_mul(0xbf58476d1ce4e5b9);
    scale((x >> 32) as u32, slots)
}

/// Scales 32 random bits to a number below `count`, which is below 2^32.
pub(crate) fn scale(bits: u32, count: usize) -> usize {
    ((u64::from(bits) * count as u64) >> 32) as usize
}

pub(crate) fn to_24(n: u32) -> [u8; 3] {
    let [a, b, c, _] = n.to_le_bytes();
    [a, b, c]
}

fn from_24([a, b, c]: [u8; 3]) -> u32 {
    u32::from_le_bytes([a, b, c, 0])
}

pub(crate) fn bad(field: &'static str, value: u64, expected: &'static str) -> FormatError {
    FormatError::BadTokenizer { field, value, expected }
}
