//! Cutting a text into the words that merges do not cross.

use mrt_format::{
    CLASS_DIGIT, CLASS_LETTER, CLASS_NUMBER, CLASS_SPACE, DigitSplit, TokenizerSection, WordSplit,
};

/// Calls `word` with each word of `text`, in order. All of them together are the text.
pub(crate) fn for_each_word(tokenizer: &TokenizerSection, text: &str, mut word: impl FnMut(&str)) {
    for_each_piece(tokenizer, text, |piece| {
        let chars = Chars { tokenizer, text: piece };
        let mut start = 0;
        while start < piece.len() {
            let end = match tokenizer.word_split() {
                WordSplit::Gpt2 => chars.gpt2_end(start),
                WordSplit::Qwen2 => chars.qwen2_end(start, 1),
                WordSplit::Llama3 => chars.qwen2_end(start, 3),
            };
            // With a damaged table of classes no part of the expression may match.
            let end = if end > start { end } else { piece.ceil_char_boundary(start + 1) };
            word(&piece[start..end]);
            start = end;
        }
    });
}

/// The first step: sets digits apart.
fn for_each_piece(tokenizer: &TokenizerSection, text: &str, mut piece: impl FnMut(&str)) {
    if tokenizer.digit_split() == DigitSplit::None {
        return piece(text);
    }
    let chars = Chars { tokenizer, text };
    let mut start = 0;
    while start < text.len() {
        let end = match chars.get(start) {
            Some((c, class)) if class & CLASS_DIGIT != 0 => match tokenizer.digit_split() {
                DigitSplit::Each => start + c.len_utf8(),
                _ => chars.run_end(start, |_, class| class & CLASS_DIGIT != 0),
            },
            _ => chars.run_end(start, |_, class| class & CLASS_DIGIT == 0),
        };
        piece(&text[start..end]);
        start = end;
    }
}

/// A text whose characters have classes.
struct Chars<'a> {
    tokenizer: &'a TokenizerSection<'a>,
    text: &'a str,
}

impl Chars<'_> {
    /// The character at byte `at` and its classes; `None` at the text's end.
    #[inline]
    fn get(&self, at: usize) -> Option<(char, u8)> {
        let byte = *self.text.as_bytes().get(at)?;
        let c = if byte.is_ascii() { byte.into() } else { self.text[at..].chars().next()? };
        Some((c, self.tokenizer.classes(c)))
    }

    /// The end of the run of characters from `start` for which `belongs` holds.
    #[inline]
    fn run_end(&self, start: usize, belongs: impl Fn(char, u8) -> bool) -> usize {
        let mut end = start;
        while let Some((c, class)) = self.get(end)
            && belongs(c, class)
        {
            end += c.len_utf8();
        }
        end
    }

    /// The end of GPT-2's word from `start`, which is before the text's end:
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
    fn gpt2_end(&self, start: usize) -> usize {
        let rest = &self.text[start..];
        if let Some(suffix) =
            ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"].iter().find(|s| rest.starts_with(**s))
        {
            return start + suffix.len();
        }
        let body = start + usize::from(rest.starts_with(' '));
        let kind = |class: u8| class & (CLASS_LETTER | CLASS_NUMBER | CLASS_SPACE);
        match self.get(body) {
            Some((_, class)) if class & CLASS_SPACE == 0 => {
                self.run_end(body, |_, other| kind(other) == kind(class))
            }
            _ => self.space_end(start),
        }
    }

    /// The end of Qwen2's word from `start`, which is before the text's end, with numbers of up to `digits`:
    /// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
    fn qwen2_end(&self, start: usize, digits: usize) -> usize {
        let Some((c, class)) = self.get(start) else { return start };
        let next = start + c.len_utf8();
        if c == '\''
            && let Some(bytes) = contraction(&self.text[next..])
        {
            return next + bytes;
        }
        let is_letter = |_, class: u8| class & CLASS_LETTER != 0;
        if is_letter(c, class) {
            return self.run_end(next, is_letter);
        }
        if class & CLASS_NUMBER != 0 {
            let number = self.text[start..].char_indices().take(digits);
            let number = number.take_while(|&(_, c)| self.tokenizer.classes(c) & CLASS_NUMBER != 0);
            return number.last().map_or(next, |(at, c)| start + at + c.len_utf8());
        }
        if !is_line_end(c) {
            let end = self.run_end(next, is_letter);
            if end > next {
                return end;
            }
        }
        let body = if c == ' ' { next } else { start };
        let is_other = |_, class: u8| class & (CLASS_LETTER | CLASS_NUMBER | CLASS_SPACE) == 0;
        let end = self.run_end(body, is_other);
        if end > body {
            return self.run_end(end, |c, _| is_line_end(c));
        }
        let spaces = &self.text[start..self.run_end(start, |_, class| class & CLASS_SPACE != 0)];
        match spaces.rfind(is_line_end) {
            Some(at) => start + at + 1,
            None => self.space_end(start),
        }
    }

    /// `\s+(?!\S)|\s+`: white space, without its last character if that is not the only one and something follows.
    fn space_end(&self, start: usize) -> usize {
        let end = self.run_end(start, |_, class| class & CLASS_SPACE != 0);
        match self.text[start..end].char_indices().next_back() {
            Some((last, _)) if last > 0 && end < self.text.len() => start + last,
            _ => end,
        }
    }
}

fn is_line_end(c: char) -> bool {
    c == '\r' || c == '\n'
}

/// The length of `s`, `t`, `re`, `ve`, `m`, `ll` or `d`, in any case, at the text's beginning.
fn contraction(text: &str) -> Option<usize> {
    // U+017F, the long s, is an s in another case.
    if let Some(c @ ('s' | 'S' | 't' | 'T' | 'm' | 'M' | 'd' | 'D' | '\u{17F}')) = text.chars().next() {
        return Some(c.len_utf8());
    }
    let two = text.as_bytes().get(..2)?;
    [b"re", b"ve", b"ll"].iter().any(|s| two.eq_ignore_ascii_case(*s)).then_some(2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mrt_format::{TokenizerParts, tokenizer_section};

    #[test]
    fn any_classes_make_words_that_are_the_text() {
        let text = "a  é1 \n\u{301}' 's ' \t 12 ";
        for class in 0..=255u8 {
            for space in [0, CLASS_SPACE, CLASS_LETTER | CLASS_DIGIT] {
                let mut classes = vec![class; 0x11_0000];
                classes[' ' as usize] = space;
                for word_split in [WordSplit::Gpt2, WordSplit::Qwen2, WordSplit::Llama3] {
                    let section = tokenizer_section(&TokenizerParts {
                        nfc: true,
                        word_split,
                        digit_split: [DigitSplit::None, DigitSplit::Each, DigitSplit::Runs]
                            [usize::from(class) % 3],
                        classes: &classes,
                        byte_tokens: [None; 256],
                        tokens: &[],
                        added: &[],
                        normalized: &[],
                    })
                    .unwrap();
                    let mut words = String::new();
                    for_each_word(&TokenizerSection::new(&section).unwrap(), text, |word| {
                        assert!(!word.is_empty());
                        words.push_str(word);
                    });
                    assert_eq!(words, text);
                }
            }
        }
    }
}
