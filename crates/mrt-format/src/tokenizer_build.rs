//! Making the `tokenizer` section.

use std::collections::{HashMap, HashSet};

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32};

use crate::error::FormatError;
use crate::tokenizer::{
    ADDED_LSTRIP, ADDED_RSTRIP, ADDED_SINGLE_WORD, AddedToken, CLASS_BLOCK, DigitSplit, FLAG_NFC,
    MAX_TOKEN_TEXT, NO_TOKEN, RawAdded, RawToken, RawTokenizer, SPECIAL_TEXT, TEXT, Token, TokenizerSection,
    WordSplit, bad, pair_hash, scale, slot_of, to_24,
};

/// All that the `tokenizer` section holds.
pub struct TokenizerParts<'a> {
    /// Whether texts are brought into NFC first.
    pub nfc: bool,
    /// How texts are split into words.
    pub word_split: WordSplit,
    /// What is done with digits before.
    pub digit_split: DigitSplit,
    /// The classes of each code point, 0x110000 of them.
    pub classes: &'a [u8],
    /// The token of each byte.
    pub byte_tokens: [Option<u32>; 256],
    /// What each id stands for. Of two merges the one with the lower id is done first.
    pub tokens: &'a [Token<'a>],
    /// The tokens that are found in a text as it is given.
    pub added: &'a [AddedToken<'a>],
    /// Those that are found in what is left of it, in NFC if that is asked for.
    pub normalized: &'a [AddedToken<'a>],
}

/// The content of the `tokenizer` section.
///
/// # Errors
/// [`FormatError::BadTokenizer`] if a limit of the section is exceeded or [`TokenizerSection::check`] finds something.
pub fn tokenizer_section(parts: &TokenizerParts) -> Result<Vec<u8>, FormatError> {
    let (class_index, class_blocks) = class_table(parts.classes)?;
    let mut texts = Texts::default();
    let tokens =
        parts.tokens.iter().map(|token| raw_token(token, &mut texts)).collect::<Result<Vec<_>, _>>()?;
    let added = raw_added(parts.added, &mut texts)?;
    let normalized = raw_added(parts.normalized, &mut texts)?;
    let pairs: Vec<_> = (0..)
        .zip(parts.tokens)
        .filter_map(|(id, token)| match *token {
            Token::Merge { left, right } => Some((left, right, id)),
            Token::Text { .. } => None,
        })
        .collect();
    let different: HashSet<_> = pairs.iter().map(|&(left, right, _)| (left, right)).collect();
    // A salt fails once in a hundred thousand or so.
    let hashed =
        (0..100).filter(|_| different.len() == pairs.len()).find_map(|salt| perfect_hash(&pairs, salt));
    let (salt, seeds, slots) = hashed.ok_or_else(|| bad("merges", pairs.len() as u64, "different pairs"))?;

    let count = |len: usize| U32::new(len as u32);
    let header = RawTokenizer {
        flags: U32::new(if parts.nfc { FLAG_NFC } else { 0 }),
        word_split: U32::new(parts.word_split as u32),
        digit_split: U32::new(parts.digit_split as u32),
        token_count: count(tokens.len()),
        added_count: count(added.len()),
        normalized_count: count(normalized.len()),
        class_blocks: count(class_blocks.len()),
        bucket_count: count(seeds.len()),
        slot_count: count(slots.len()),
        salt: U32::new(salt),
        text_bytes: count(texts.bytes.len()),
        reserved: [0; 20],
    };
    let byte_tokens = parts.byte_tokens.map(|id| U32::new(id.unwrap_or(NO_TOKEN)));
    let section = [
        header.as_bytes(),
        &class_index,
        class_blocks.as_bytes(),
        byte_tokens.as_bytes(),
        added.as_bytes(),
        normalized.as_bytes(),
        seeds.as_bytes(),
        slots.as_bytes(),
        tokens.as_bytes(),
        &texts.bytes,
    ]
    .concat();
    TokenizerSection::new(&section)?.check()?;
    Ok(section)
}

/// The blocks of the class table, each once, and the block of each 256 code points.
fn class_table(classes: &[u8]) -> Result<(Vec<u8>, Vec<[u8; CLASS_BLOCK]>), FormatError> {
    let (blocks, _) = classes.as_chunks::<CLASS_BLOCK>();
    if classes.len() != 0x11_0000 {
        return Err(bad("classes", classes.len() as u64, "1114112"));
    }
    let mut table: Vec<[u8; CLASS_BLOCK]> = Vec::new();
    let mut index = Vec::with_capacity(blocks.len());
    for block in blocks {
        let known = table.iter().position(|known| known == block);
        let i = known.unwrap_or_else(|| {
            table.push(*block);
            table.len() - 1
        });
        index.push(u8::try_from(i).map_err(|_| bad("class_blocks", table.len() as u64, "at most 256"))?);
    }
    Ok((index, table))
}

/// Texts one after the other, each once.
#[derive(Default)]
struct Texts {
    bytes: Vec<u8>,
    offsets: HashMap<Vec<u8>, usize>,
}

impl Texts {
    fn offset(&mut self, text: &[u8]) -> usize {
        *self.offsets.entry(text.to_vec()).or_insert_with(|| {
            self.bytes.extend_from_slice(text);
            self.bytes.len() - text.len()
        })
    }
}

fn raw_token(token: &Token, texts: &mut Texts) -> Result<RawToken, FormatError> {
    let (left, right) = match *token {
        Token::Merge { left, right } => (left, right),
        Token::Text { bytes, special } => {
            if bytes.len() > MAX_TOKEN_TEXT {
                return Err(bad("a token's text", bytes.len() as u64, "at most 255 bytes"));
            }
            let left = (if special { SPECIAL_TEXT } else { TEXT }) + bytes.len() as u32;
            let offset = texts.offset(bytes);
            if offset >= 1 << 24 {
                return Err(bad("text_bytes", offset as u64, "at most 16777216"));
            }
            (left, offset as u32)
        }
    };
    Ok(RawToken { left: to_24(left), right: to_24(right) })
}

fn raw_added(added: &[AddedToken], texts: &mut Texts) -> Result<Vec<RawAdded>, FormatError> {
    let mut sorted: Vec<_> = added.iter().collect();
    sorted.sort_by_key(|token| token.text);
    let raw = |token: &AddedToken| {
        let flag = |on: bool, flag: u16| if on { flag } else { 0 };
        let bytes = u16::try_from(token.text.len())
            .map_err(|_| bad("an added token's text", token.text.len() as u64, "at most 65535 bytes"))?;
        Ok(RawAdded {
            id: token.id.into(),
            offset: U32::new(texts.offset(token.text) as u32),
            bytes: bytes.into(),
            flags: U16::new(
                flag(token.lstrip, ADDED_LSTRIP)
                    | flag(token.rstrip, ADDED_RSTRIP)
                    | flag(token.single_word, ADDED_SINGLE_WORD),
            ),
        })
    };
    sorted.into_iter().map(raw).collect()
}

/// The salt, seeds and slots for these pairs and their ids: the pairs of a bucket take the first seed that puts all of them into
/// free slots, large buckets first. `None` if a bucket has no such seed.
fn perfect_hash(pairs: &[(u32, u32, u32)], salt: u32) -> Option<(u32, Vec<U16>, Vec<U32>)> {
    const EMPTY: u32 = u32::MAX;
    let bucket_count = pairs.len() / 4 + 1;
    let slot_count = pairs.len() + pairs.len() / 16 + 1;
    let mut buckets = vec![Vec::new(); bucket_count];
    for &(left, right, id) in pairs {
        let hash = pair_hash(left, right, salt);
        buckets[scale(hash as u32, bucket_count)].push((hash, id));
    }
    let mut order: Vec<_> = (0..bucket_count).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(buckets[i].len()));

    let mut seeds = vec![U16::new(0); bucket_count];
    let mut slots = vec![EMPTY; slot_count];
    for i in order {
        let bucket = &buckets[i];
        let fits = |&seed: &u16| {
            let place = |k: usize| slot_of(bucket[k].0, seed, slot_count);
            (0..bucket.len()).all(|k| slots[place(k)] == EMPTY && (0..k).all(|j| place(j) != place(k)))
        };
        let seed = (0..=u16::MAX).find(fits)?;
        seeds[i] = seed.into();
        for &(hash, id) in bucket {
            slots[slot_of(hash, seed, slot_count)] = (hash as u32 & 0xff) << 24 | id;
        }
    }
    Some((salt, seeds, slots.into_iter().map(U32::new).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::sha256;
    use crate::tokenizer::{
        CLASS_DIGIT, CLASS_LETTER, CLASS_NFC_INERT, CLASS_NUMBER, CLASS_SPACE, CLASS_WORD,
    };
    use proptest::prelude::*;

    /// The tokenizer of the test vector in `format-spec.md`.
    fn section_of<'a>(
        change: impl FnOnce(&mut Vec<Token<'a>>, &mut Vec<AddedToken<'a>>),
    ) -> Result<Vec<u8>, FormatError> {
        let mut classes = vec![CLASS_NFC_INERT; 0x11_0000];
        classes[0x300..0x370].fill(0);
        for (range, class) in [
            ('a'..='z', CLASS_LETTER | CLASS_WORD),
            ('A'..='Z', CLASS_LETTER | CLASS_WORD),
            ('0'..='9', CLASS_NUMBER | CLASS_DIGIT | CLASS_WORD),
            ('\t'..='\r', CLASS_SPACE),
            (' '..=' ', CLASS_SPACE),
        ] {
            range.for_each(|c| classes[c as usize] |= class);
        }
        let mut byte_tokens = [None; 256];
        for (id, byte) in (0..).zip(b"abc ") {
            byte_tokens[usize::from(*byte)] = Some(id);
        }
        let text = |bytes, special| Token::Text { bytes, special };
        let merge = |left, right| Token::Merge { left, right };
        let mut tokens = vec![text(b"a", false), text(b"b", false), text(b"c", false), text(b" ", false)];
        tokens.extend([merge(0, 1), merge(3, 0), merge(4, 2), text(b"<end>", true), text(b"<x>", false)]);
        let token = |id, text| AddedToken { id, text, lstrip: false, rstrip: false, single_word: false };
        let mut added = vec![token(8, &b"<x>"[..]), AddedToken { rstrip: true, ..token(7, b"<end>") }];
        change(&mut tokens, &mut added);
        tokenizer_section(&TokenizerParts {
            nfc: true,
            word_split: WordSplit::Qwen2,
            digit_split: DigitSplit::None,
            classes: &classes,
            byte_tokens,
            tokens: &tokens,
            added: &added,
            normalized: &[AddedToken { single_word: true, lstrip: true, ..token(6, b"abc") }],
        })
    }

    fn section() -> Vec<u8> {
        section_of(|_, _| ()).unwrap()
    }

    #[test]
    fn what_goes_in_comes_out() {
        let content = section();
        let tokenizer = TokenizerSection::new(&content).unwrap();
        assert!(tokenizer.nfc());
        assert_eq!(tokenizer.word_split(), WordSplit::Qwen2);
        assert_eq!(tokenizer.digit_split(), DigitSplit::None);
        assert_eq!(tokenizer.token_count(), 9);
        assert_eq!(tokenizer.classes('z'), CLASS_LETTER | CLASS_WORD | CLASS_NFC_INERT);
        assert_eq!(tokenizer.classes('\u{301}'), 0);
        assert_eq!(tokenizer.classes(char::MAX), CLASS_NFC_INERT);
        assert_eq!((tokenizer.byte_token(b'b'), tokenizer.byte_token(b'z')), (Some(1), None));
        assert_eq!(tokenizer.merge(0, 1), Some(4));
        assert_eq!(tokenizer.merge(4, 2), Some(6));
        assert_eq!(tokenizer.token(5), Some(Token::Merge { left: 3, right: 0 }));
        assert_eq!(tokenizer.token(7), Some(Token::Text { bytes: b"<end>", special: true }));
        assert_eq!(tokenizer.token(9), None);
        assert!(tokenizer.is_special(7) && !tokenizer.is_special(8) && !tokenizer.is_special(9));
        let mut bytes = Vec::new();
        (0..10).for_each(|id| tokenizer.append_bytes(id, &mut bytes));
        assert_eq!(bytes, b"abc ab aabc<end><x>");
    }

    #[test]
    fn pairs_that_are_no_merge_are_none() {
        let content = section();
        let tokenizer = TokenizerSection::new(&content).unwrap();
        let merges = [(0, 1), (3, 0), (4, 2)];
        for pair in (0..2000).flat_map(|left| (0..2000).map(move |right| (left, right))) {
            assert_eq!(tokenizer.merge(pair.0, pair.1).is_some(), merges.contains(&pair), "{pair:?}");
        }
        assert_eq!(tokenizer.merge(u32::MAX, u32::MAX), None);
    }

    #[test]
    fn the_longest_added_token_is_found() {
        let content = section_of(|_, added| {
            let token = added[0];
            added
                .extend([b"<xy>", b"<x>y" as &[u8], b"<", b"<x>yz"].map(|text| AddedToken { text, ..token }));
        })
        .unwrap();
        let added = TokenizerSection::new(&content).unwrap().added();
        let found = |text: &str| {
            added.longest_prefix(text.as_bytes()).map(|token| token.text.escape_ascii().to_string())
        };
        assert_eq!(found("<x>yz "), Some("<x>yz".to_owned()));
        assert_eq!(found("<x>y"), Some("<x>y".to_owned()));
        assert_eq!(found("<x>z"), Some("<x>".to_owned()));
        assert_eq!(found("<xy"), Some("<".to_owned()));
        assert_eq!(found("x"), None);
        assert_eq!(found(""), None);
        let token = added.longest_prefix(b"<end>").unwrap();
        assert!(token.id == 7 && token.rstrip && !token.lstrip && !token.single_word);
    }

    #[test]
    fn many_merges_find_their_slots() {
        // Every pair of 300 tokens.
        let texts: Vec<_> = (0..300u32).map(u32::to_le_bytes).collect();
        let mut tokens: Vec<_> = texts.iter().map(|bytes| Token::Text { bytes, special: false }).collect();
        tokens.extend((0..90_000).map(|i| Token::Merge { left: i / 300, right: i % 300 }));
        let content = section_of(|all, _| *all = tokens).unwrap();
        let tokenizer = TokenizerSection::new(&content).unwrap();
        assert!((0..90_000).all(|i| tokenizer.merge(i / 300, i % 300) == Some(300 + i)));
        // Three bytes for each of a pair, a slot of four with 1/16 to spare, a seed for four merges.
        assert!(content.len() < 90_300 * 11 + 5000 + 45_000, "{}", content.len());
    }

    #[test]
    fn what_the_section_cannot_hold_is_refused() {
        let error =
            |change: fn(&mut Vec<Token>, &mut Vec<AddedToken>)| section_of(change).unwrap_err().to_string();
        assert_eq!(
            error(|tokens, _| tokens[4] = Token::Merge { left: 4, right: 1 }),
            "tokenizer: token is 4, must be a text, or a merge of lower ids of at most 4096 parts; convert the model again"
        );
        assert_eq!(
            error(|tokens, _| tokens[8] = Token::Merge { left: 0, right: 1 }),
            "tokenizer: merges is 4, must be different pairs; convert the model again"
        );
        assert_eq!(
            error(|tokens, _| tokens[8] = Token::Text { bytes: &[b'a'; 256], special: false }),
            "tokenizer: a token's text is 256, must be at most 255 bytes; convert the model again"
        );
        assert_eq!(
            error(|_, added| added[0].id = 9),
            "tokenizer: added id is 9, must be below token_count; convert the model again"
        );
        for text in [&b""[..], b"<end>", b"\xff"] {
            let error = section_of(|_, added| added[0].text = text).unwrap_err().to_string();
            assert!(error.contains("must be that of a text in UTF-8"), "{error}");
        }
    }

    #[test]
    fn bad_headers_are_refused() {
        let error = |offset: usize, value: u32| {
            let mut content = section();
            content[offset..][..4].copy_from_slice(&value.to_le_bytes());
            match TokenizerSection::new(&content).err() {
                Some(FormatError::BadTokenizer { field, .. }) => field,
                other => panic!("{other:?}"),
            }
        };
        for (offset, value, field) in [
            (0, 2, "flags"),
            (4, 0, "word_split"),
            (4, 4, "word_split"),
            (8, 3, "digit_split"),
            (12, 10, "bytes"),
            (12, u32::MAX, "token_count"),
            (16, u32::MAX, "bytes"),
            (20, 0, "bytes"),
            (24, 0, "class_blocks"),
            (24, 257, "class_blocks"),
            (28, u32::MAX, "bytes"),
            (32, u32::MAX, "bytes"),
            (40, 0, "bytes"),
            (44, 1, "reserved"),
            (60, 1 << 24, "reserved"),
        ] {
            assert_eq!(error(offset, value), field, "{value} at {offset}");
        }
        let content = section();
        assert!(TokenizerSection::new(&content[..content.len() - 1]).is_err());
        assert!(TokenizerSection::new(b"").is_err());
    }

    /// Everything that a reader does with a section.
    fn use_all(content: &[u8]) {
        let Ok(tokenizer) = TokenizerSection::new(content) else { return };
        let _ = tokenizer.check();
        let mut bytes = Vec::new();
        for id in (0..tokenizer.token_count().min(300)).chain([u32::MAX]) {
            tokenizer.append_bytes(id, &mut bytes);
            bytes.truncate(100);
            let _ = (tokenizer.merge(id, 0), tokenizer.is_special(id));
        }
        for text in [&b"<end>"[..], b"abc", b"", b"\xff"] {
            let _ = tokenizer.added().longest_prefix(text);
            let _ = tokenizer.normalized_added().longest_prefix(text);
        }
        for c in ['a', 'é', '\u{301}', char::MAX] {
            let _ = tokenizer.classes(c);
        }
        (0..=255).for_each(|byte| _ = tokenizer.byte_token(byte));
    }

    /// Where the tokens begin in a section; the slots end there.
    fn tokens_at(content: &[u8]) -> usize {
        let field = |offset: usize| u32::from_le_bytes(content[offset..][..4].try_into().unwrap()) as usize;
        content.len() - field(40) - 6 * field(12)
    }

    #[test]
    fn a_merge_that_is_not_above_its_parts_is_none() {
        let mut content = section();
        assert_eq!(TokenizerSection::new(&content).unwrap().merge(3, 0), Some(5));
        // The slot of (3, 0) leads to token 2, which becomes 3 followed by 0.
        let tokens_at = tokens_at(&content);
        let slot = (1..=4).map(|i| tokens_at - 4 * i).find(|&at| content[at..][..3] == [5, 0, 0]).unwrap();
        content[slot] = 2;
        content[tokens_at + 12..][..6].copy_from_slice(&[3, 0, 0, 0, 0, 0]);
        let tokenizer = TokenizerSection::new(&content).unwrap();
        assert_eq!((tokenizer.merge(3, 0), tokenizer.token(2)), (None, None));
    }

    #[test]
    fn an_added_token_without_an_id_of_the_tokenizer_is_none() {
        let mut content = section_of(|_, added| added.push(AddedToken { text: b"<", ..added[0] })).unwrap();
        let found = |content: &[u8]| {
            let added = TokenizerSection::new(content).unwrap().added();
            let texts: Vec<_> = added.iter().map(|token| token.text.len()).collect();
            (added.longest_prefix(b"<x>").map(|token| token.text.len()), texts)
        };
        assert_eq!(found(&content), (Some(3), vec![1, 5, 3]));
        let blocks = content[24] as usize;
        let third = 64 + 4352 + 256 * blocks + 1024 + 2 * 12;
        content[third..][..4].copy_from_slice(&9u32.to_le_bytes());
        assert_eq!(found(&content), (Some(1), vec![1, 5]));
    }

    #[test]
    fn chains_of_merges_end() {
        // A token that has twice as many parts as the one before, and one that nests without end.
        let content = section_of(|tokens, _| tokens[8] = Token::Text { bytes: b"", special: false }).unwrap();
        let tokens_at = tokens_at(&content);
        for (left, right) in [(0, 0), (0, 1)] {
            let mut content = content.clone();
            let last = 8;
            for id in 1..=last {
                let parts = [id - 1, if right == 0 { id - 1 } else { left }];
                content[tokens_at + 6 * id..][..6].copy_from_slice(&[
                    parts[0] as u8,
                    0,
                    0,
                    parts[1] as u8,
                    0,
                    0,
                ]);
            }
            use_all(&content);
        }
    }

    proptest! {
        #[test]
        fn damaged_sections_do_no_harm(damage in prop::collection::vec((any::<u16>(), any::<u8>()), 1..20)) {
            let mut content = section();
            // The class table, in the middle, is large and dull.
            let behind = content.len() - 1300;
            for (at, byte) in damage {
                let at = usize::from(at) % 1364;
                content[if at < 64 { at } else { behind + at - 64 }] = byte;
            }
            use_all(&content);
        }

        #[test]
        fn arbitrary_sections_do_no_harm(content in prop::collection::vec(any::<u8>(), 0..200)) {
            use_all(&content);
        }
    }

    #[test]
    fn the_test_vector_of_the_specification() {
        let content = section();
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../format-spec.md");
        let spec = std::fs::read_to_string(path).unwrap();
        let expected =
            format!("It has {} bytes, and their SHA-256 is\n`{}`", content.len(), sha256(&content));
        assert!(spec.contains(&expected), "not in format-spec.md: {expected}");
    }
}
