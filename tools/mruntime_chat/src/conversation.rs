//! The conversation as tokens.
//!
//! Each turn renders the chat template over the whole conversation. The tokens of what was rendered or answered before
//! are kept, and only what is new is tokenized: an answer keeps the tokens that the model chose, which need not be those
//! that the tokenizer would choose for its text, so the KV cache still holds all of it.

use std::cell::OnceCell;

use mr_cli::{Result, TemplateSource};
use mruntime_text::{ChatTemplate, SpecialTokens, Tokenizer};
use serde_json::{Value, json};

/// What was said so far.
pub struct Conversation<'a> {
    tokenizer: &'a Tokenizer<'a>,
    /// None: texts are continued as they are, each one by itself.
    template: Option<TemplateSource>,
    /// The template, from the first message on.
    compiled: OnceCell<ChatTemplate>,
    system: Option<&'a str>,
    /// What the last turn ended with.
    messages: Vec<Value>,
    text: String,
    tokens: Vec<u32>,
}

/// The conversation with a new message of the user, up to where the answer begins.
pub struct Turn {
    messages: Vec<Value>,
    text: String,
    tokens: Vec<u32>,
}

impl Turn {
    /// The whole conversation.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }
}

impl<'a> Conversation<'a> {
    /// An empty conversation.
    pub fn new(
        tokenizer: &'a Tokenizer<'a>,
        template: Option<TemplateSource>,
        system: Option<&'a str>,
    ) -> Conversation<'a> {
        let (compiled, messages, text, tokens) = Default::default();
        let mut conversation = Conversation { tokenizer, template, compiled, system, messages, text, tokens };
        conversation.reset();
        conversation
    }

    /// Forgets all but the system message.
    pub fn reset(&mut self) {
        self.messages =
            self.system.iter().map(|system| json!({ "role": "system", "content": system })).collect();
        self.text.clear();
        self.tokens.clear();
    }

    /// The conversation with `message`, which becomes part of it by [`accept`](Self::accept) only.
    pub fn turn(&self, message: &str) -> Result<Turn> {
        let Some(source) = &self.template else {
            let tokens = self.tokenizer.encode(message, SpecialTokens::Parse)?;
            return Ok(Turn { messages: Vec::new(), text: String::new(), tokens });
        };
        let mut messages = self.messages.clone();
        messages.push(json!({ "role": "user", "content": message }));
        let text = self.compiled(source)?.render(&messages, None, true)?;
        let tokens = match self.continued(&text)? {
            Some(tokens) => tokens,
            None => self.tokenizer.encode(&text, SpecialTokens::Parse)?,
        };
        Ok(Turn { messages, text, tokens })
    }

    /// The compiled template.
    fn compiled(&self, source: &TemplateSource) -> Result<&ChatTemplate> {
        match self.compiled.get() {
            Some(template) => Ok(template),
            None => {
                let template = source.compile()?;
                Ok(self.compiled.get_or_init(|| template))
            }
        }
    }

    /// The tokens of `text` if it continues the conversation's text with a special token, at which tokenizing can begin.
    fn continued(&self, text: &str) -> Result<Option<Vec<u32>>> {
        let Some(new) = text.strip_prefix(&self.text) else { return Ok(None) };
        let new = self.tokenizer.encode(new, SpecialTokens::Parse)?;
        let continues = new.first().is_some_and(|&token| self.tokenizer.is_special(token));
        Ok(continues.then(|| [&self.tokens, new.as_slice()].concat()))
    }

    /// Makes a turn and the tokens of its answer part of the conversation.
    pub fn accept(&mut self, turn: Turn, answer: &[u32]) {
        if self.template.is_none() {
            return;
        }
        let Turn { mut messages, mut text, mut tokens } = turn;
        // Special tokens in it are part of what was said.
        let said = self.tokenizer.decode(answer, false);
        text.push_str(&said);
        tokens.extend_from_slice(answer);
        messages.push(json!({ "role": "assistant", "content": said }));
        (self.messages, self.text, self.tokens) = (messages, text, tokens);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mruntime_text::SpecialTokenNames;

    const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                            {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

    fn tokenizer() -> Tokenizer<'static> {
        Tokenizer::from_json(include_bytes!("../tests/fixture/tokenizer.json")).unwrap()
    }

    fn template(source: &str) -> Option<TemplateSource> {
        let names = SpecialTokenNames::default();
        Some(TemplateSource { path: "model.mrt".into(), text: source.to_owned(), names })
    }

    #[test]
    fn an_answer_keeps_the_tokens_that_were_generated() {
        let (tokenizer, template) = (tokenizer(), template(TEMPLATE));
        let mut conversation = Conversation::new(&tokenizer, template, None);
        let first = conversation.turn("hi").unwrap();
        let before = first.tokens().to_vec();
        // The tokenizer would make one token of it.
        let answer: Vec<u32> = b"the".iter().map(|&byte| byte.into()).collect();
        assert_eq!(tokenizer.encode("the", SpecialTokens::Parse).unwrap().len(), 1);
        conversation.accept(first, &answer);
        let rest = "<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n";
        let rest = tokenizer.encode(rest, SpecialTokens::Parse).unwrap();
        assert_eq!(conversation.turn("hi").unwrap().tokens(), [before, answer, rest].concat());
    }

    #[test]
    fn text_that_does_not_continue_is_tokenized_as_a_whole() {
        let tokenizer = tokenizer();
        // The first rewrites what was said; the second continues it with text that may melt into it.
        for (source, expected) in [
            (
                "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}",
                "A<|im_end|>T<|im_end|>HE<|im_end|>",
            ),
            ("{% for m in messages %}{{ m.content }}{% endfor %}", "athe"),
        ] {
            let template = template(source);
            let mut conversation = Conversation::new(&tokenizer, template, None);
            let first = conversation.turn("a").unwrap();
            conversation.accept(first, &[b't'.into()]);
            let expected = tokenizer.encode(expected, SpecialTokens::Parse).unwrap();
            assert_eq!(conversation.turn("he").unwrap().tokens(), expected);
        }
    }

    #[test]
    fn a_reset_leaves_the_system_message() {
        let (tokenizer, template) = (tokenizer(), template(TEMPLATE));
        let mut conversation = Conversation::new(&tokenizer, template, Some("be an ant"));
        let first = conversation.turn("hi").unwrap();
        let tokens = first.tokens().to_vec();
        conversation.accept(first, &[65]);
        assert_ne!(conversation.turn("hi").unwrap().tokens(), tokens);
        conversation.reset();
        assert_eq!(conversation.turn("hi").unwrap().tokens(), tokens);
    }
}
