//! The program as its users start it, on tiny models with random weights: what they answer is noise, but it must be the
//! noise that the library computes from the tokens of the whole conversation.

#![forbid(unsafe_code)]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use mruntime_tests::{Run, TinyModel, with_model};
use mruntime_text::{ChatTemplate, SpecialTokenNames, SpecialTokens, Tokenizer, find_chat_template};
use tempfile::TempDir;

/// A tiny model with a tokenizer and a chat template, in a folder of its own.
struct ChatModel {
    dir: TempDir,
    tokenizer: Tokenizer<'static>,
    template: ChatTemplate,
}

/// Tokens of the answers, few enough that all conversations fit into the context.
const ANSWER: usize = 12;

fn fixture(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixture").join(name)).unwrap()
}

impl ChatModel {
    /// With a generation_config.json of this content.
    fn new(generation: &str) -> ChatModel {
        let dir = tempfile::tempdir().unwrap();
        let model = TinyModel::named("tied").dir;
        for name in ["config.json", "model.safetensors"] {
            fs::copy(model.join(name), dir.path().join(name)).unwrap();
        }
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            fs::write(dir.path().join(name), fixture(name)).unwrap();
        }
        fs::write(dir.path().join("generation_config.json"), generation).unwrap();
        let tokenizer = Tokenizer::from_json(&fixture("tokenizer.json")).unwrap();
        let config = fixture("tokenizer_config.json");
        let names = SpecialTokenNames::from_tokenizer_config(&config).unwrap();
        let source = find_chat_template(None, Some(&config)).unwrap().unwrap();
        let template = ChatTemplate::new(&source, &names).unwrap();
        ChatModel { dir, tokenizer, template }
    }

    /// Greedy, and no token stops it.
    fn greedy() -> ChatModel {
        ChatModel::new(r#"{"eos_token_id": []}"#)
    }

    fn dir(&self) -> &str {
        self.dir.path().to_str().unwrap()
    }

    /// Converts it to a file and gives the file's name.
    fn convert(&self) -> PathBuf {
        let file = self.dir.path().join("model.mrt");
        self.tiny().convert(&file, 2);
        file
    }

    fn tiny(&self) -> TinyModel {
        TinyModel { dir: self.dir.path().to_owned(), vocab: 320, prompts: Vec::new() }
    }

    /// Runs the program on the folder.
    fn chat(&self, args: &[&str], stdin: &str) -> Output {
        chat(&[&["--model-dir", self.dir()], args].concat(), stdin)
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        self.tokenizer.encode(text, SpecialTokens::Parse).unwrap()
    }

    /// What the library generates after `prompt`, computed from its first token on.
    fn continuation(&self, prompt: &[u32]) -> Vec<u32> {
        let (cfg, weights) = self.tiny().load();
        with_model(&cfg, weights.bytes(), 512, Run::usual(), |mut model| model.generate(prompt, ANSWER))
    }

    /// The lines that the program must write for an answer.
    fn shown(&self, answer: &[u32]) -> String {
        self.tokenizer.decode(answer, true) + "\n"
    }
}

fn chat(args: &[&str], stdin: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_mruntime_chat"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may have ended with an error before it reads.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    child.wait_with_output().unwrap()
}

/// What a program that succeeded wrote to stdout.
fn stdout(output: Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The one line that tells the error of a program that failed and wrote nothing else.
fn error(output: &Output) -> String {
    let stderr = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let message = stderr.strip_prefix("error: ").unwrap_or_else(|| panic!("{stderr}")).trim_end();
    assert!(!message.contains('\n'), "{stderr}");
    message.to_owned()
}

const SHORT: [&str; 2] = ["--max-new-tokens", "12"];

#[test]
fn one_answer_is_what_the_library_generates() {
    let model = ChatModel::greedy();
    let prompt = model.encode("<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\n");
    let expected = model.shown(&model.continuation(&prompt));
    let output = model.chat(&[&["-p", "hi there"], SHORT.as_slice()].concat(), "ignored");
    let stderr = stderr(&output);
    assert_eq!(stdout(output), expected);
    assert!(stderr.starts_with(&format!("prompt: {} tokens, ", prompt.len())), "{stderr}");
    assert!(stderr.contains("; generation: 12 tokens, ") && stderr.contains(" tokens/s\n"), "{stderr}");

    // What the program says beside the answer is nobody's loss.
    #[cfg(target_os = "linux")]
    {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mruntime_chat"));
        command.args(["--model-dir", model.dir(), "-p", "hi there"]).args(SHORT);
        command.stderr(fs::File::options().write(true).open("/dev/full").unwrap());
        assert_eq!(stdout(command.output().unwrap()), expected);
    }

    let file = model.convert();
    let file = file.to_str().unwrap();
    for args in [&["-m", file, "--greedy"][..], &["-m", file, "--verify"], &["-m", file, "--threads", "1"]] {
        let args = [args, &["-p", "hi there"], &SHORT].concat();
        assert_eq!(stdout(chat(&args, "")), expected);
    }
}

#[test]
fn raw_continues_the_text() {
    let model = ChatModel::greedy();
    let answer = |text: &str| model.shown(&model.continuation(&model.encode(text)));
    let args = [&["--raw"], SHORT.as_slice()].concat();
    for text in ["the user", "- the user"] {
        assert_eq!(stdout(model.chat(&[&args[..], &["-p", text]].concat(), "")), answer(text));
    }
    // A text of several lines, from a file or standard input.
    let file = model.dir.path().join("prompt.txt");
    fs::write(&file, "the user\nthe\n").unwrap();
    let expected = answer("the user\nthe");
    let file = file.to_str().unwrap();
    assert_eq!(stdout(model.chat(&[&args[..], &["-f", file]].concat(), "ignored")), expected);
    assert_eq!(stdout(model.chat(&[&args[..], &["-f", "-"]].concat(), "the user\nthe")), expected);
    assert!(error(&model.chat(&["-f", "gone.txt"], "")).contains("gone.txt: No such file"));
    // Each line by itself, whatever went before.
    let expected = [answer("the user"), answer("the"), answer("the user")].concat();
    assert_eq!(stdout(model.chat(&args, "the user\nthe\nthe user\n")), expected);
}

#[test]
fn a_conversation_answers_from_all_that_was_said() {
    let model = ChatModel::greedy();
    // As the template has it, but with the tokens that were generated in place of their text.
    let mut tokens = model.encode("<|im_start|>system\nbe an ant<|im_end|>\n");
    let system = tokens.clone();
    let mut expected = Vec::new();
    for message in ["hi", "who is it?", "hi"] {
        if expected.len() == 2 {
            tokens = system.clone();
        }
        let turn = format!("<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n");
        tokens.extend(model.encode(&turn));
        let answer = model.continuation(&tokens);
        expected.push(model.shown(&answer));
        tokens.extend(answer);
        tokens.extend(model.encode("<|im_end|>\n"));
    }
    let args = [&["--system", "be an ant"], SHORT.as_slice()].concat();
    let output = model.chat(&args, "hi\n\nwho is it?\n/reset\nhi\r\n/exit\nhi\n");
    let stderr = stderr(&output);
    assert_eq!(stdout(output), expected.concat());
    assert_eq!(expected[0], expected[2]);

    // Of the second turn only what is new was prefilled, and of the third one token.
    let turn = |message: &str| {
        model.encode(&format!("<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n")).len()
    };
    // The last token of an answer is not in the cache; then come the end of the answer and the next turn.
    let prefilled =
        system.len() + turn("hi") + 1 + model.encode("<|im_end|>\n").len() + turn("who is it?") + 1;
    assert!(stderr.starts_with(&format!("prompt: {prefilled} tokens, ")), "{prefilled}: {stderr}");
    assert!(stderr.contains("more were in the KV cache"), "{stderr}");
}

#[test]
fn a_terminal_is_asked_until_the_user_leaves() {
    let model = ChatModel::greedy();
    let prompt = model.encode("the user");
    // What comes from a terminal has its own ends of lines, and is read as one character a byte.
    let answer = model.shown(&model.continuation(&prompt)).replace('\n', "\r\n");
    let answer: String = answer.bytes().map(char::from).collect();
    let mut command = Command::new(env!("CARGO_BIN_EXE_mruntime_chat"));
    command.args(["--model-dir", model.dir(), "--raw"]).args(SHORT).env("TERM", "xterm");
    let mut terminal = rexpect::session::spawn_command(command, Some(60_000)).unwrap();
    terminal.exp_string("context 512; /help lists the commands").unwrap();
    for _ in 0..2 {
        terminal.exp_string("> ").unwrap();
        terminal.send_line("the user").unwrap();
        terminal.exp_string(&answer).unwrap();
        // None of these ends the conversation.
        terminal.exp_string("> ").unwrap();
        terminal.send_control('c').unwrap();
        terminal.exp_string("> ").unwrap();
        terminal.process().get_file_handle().unwrap().write_all(b"caf\xe9\n").unwrap();
        terminal.exp_string("error: what was typed is not UTF-8").unwrap();
        terminal.exp_string("> ").unwrap();
        terminal.send_line(&"the user ".repeat(300)).unwrap();
        terminal.exp_string("error: the prompt and what goes before it have ").unwrap();
    }
    terminal.exp_string("> ").unwrap();
    terminal.send_control('d').unwrap();
    terminal.exp_string("; generation: 24 tokens").unwrap();
    terminal.exp_eof().unwrap();
}

#[test]
fn the_template_is_the_models() {
    let model = ChatModel::greedy();
    let template = "{% for m in messages %}({{ m.role }}: {{ m.content | trim }}){% endfor %}";
    fs::write(model.dir.path().join("chat_template.jinja"), template).unwrap();
    // It trims what was said: the text of the conversation changes, and all of it is tokenized again.
    let first = model.continuation(&model.encode("(user: hi)"));
    let said = model.tokenizer.decode(&first, false);
    let second =
        model.continuation(&model.encode(&format!("(user: hi)(assistant: {})(user: the)", said.trim())));
    let expected = model.shown(&first) + &model.shown(&second);
    assert_eq!(stdout(model.chat(&SHORT, "hi\nthe\n")), expected);
    let file = model.convert();
    let args = [&["-m", file.to_str().unwrap()], SHORT.as_slice()].concat();
    assert_eq!(stdout(chat(&args, "hi\nthe\n")), expected);
}

#[test]
fn a_stop_token_of_the_file_ends_the_answer() {
    let greedy = ChatModel::greedy();
    let messages = [serde_json::json!({ "role": "user", "content": "hi" })];
    let prompt = greedy.encode(&greedy.template.render(&messages, None, true).unwrap());
    let answer = greedy.continuation(&prompt);
    // The first token that the answer did not have before.
    let at = (3..ANSWER).find(|&i| !answer[..i].contains(&answer[i])).unwrap();
    let model = ChatModel::new(&format!(r#"{{"eos_token_id": [{}, 319]}}"#, answer[at]));
    let file = model.convert();
    let output = chat(&["-m", file.to_str().unwrap(), "-p", "hi"], "");
    let stderr = stderr(&output);
    assert_eq!(stdout(output), model.shown(&answer[..at]));
    assert!(stderr.contains(&format!("; generation: {at} tokens")), "{stderr}");
}

#[test]
fn sampling_defaults_are_the_models_and_flags_override_them() {
    let plain = ChatModel::greedy();
    let sampling = ChatModel::new(
        r#"{"eos_token_id": [], "do_sample": true, "temperature": 2.5, "top_k": 30, "top_p": 0.95, "repetition_penalty": 1.25}"#,
    );
    let prompt = [&["-p", "hi"], SHORT.as_slice()].concat();
    let by_default = |seed| stdout(sampling.chat(&[&prompt[..], &["--seed", seed]].concat(), ""));
    let flags = ["--temperature", "2.5", "--top-k", "30", "--top-p", "0.95", "--repetition-penalty", "1.25"];
    let by_flags = stdout(plain.chat(&[&prompt[..], &flags, &["--seed", "7"]].concat(), ""));
    assert_eq!(by_default("7"), by_flags);
    assert_ne!(by_default("7"), by_default("8"));
    let greedy = stdout(plain.chat(&prompt, ""));
    assert_ne!(by_default("7"), greedy);
    assert_eq!(stdout(sampling.chat(&[&prompt[..], &["--greedy"]].concat(), "")), greedy);

    // A seed by chance is told, so that the answer can be had again.
    let output = sampling.chat(&prompt, "");
    let stderr = stderr(&output);
    let seed = stderr.lines().find_map(|line| line.strip_prefix("seed: ")).unwrap();
    assert_eq!(stdout(output), by_default(seed));
}

#[test]
fn a_full_context_ends_the_answer_and_a_long_prompt_is_refused() {
    let model = ChatModel::greedy();
    let prompt = model.encode("the user");
    assert_eq!(prompt.len(), 3);
    let output = model.chat(&["--raw", "--ctx", "8", "-p", "the user"], "");
    let notice = stderr(&output);
    // Five more positions, and the token after the last of them.
    assert_eq!(stdout(output), model.shown(&model.continuation(&prompt)[..6]));
    assert!(notice.contains("the context of 8 tokens is full"), "{notice}");

    let long = error(&model.chat(&["--raw", "--ctx", "2", "-p", "the user"], ""));
    assert!(long.contains("have 3 tokens") && long.contains("room for 2"), "{long}");
    let trained = error(&model.chat(&["--ctx", "513", "-p", "hi"], ""));
    assert!(trained.contains("513") && trained.contains("512"), "{trained}");
}

#[test]
fn what_is_missing_or_damaged_is_named() {
    let model = ChatModel::greedy();
    assert!(error(&model.chat(&["-p", " "], "")).contains("prompt is empty"));
    for option in ["-m", "--model-dir"] {
        assert!(error(&chat(&[option, "no/such/model", "-p", "hi"], "")).starts_with("no/such/model: "));
    }

    let file = model.convert();
    let bytes = fs::read(&file).unwrap();
    let open = |bytes: &[u8], args: &[&str]| {
        fs::write(&file, bytes).unwrap();
        let error = error(&chat(&[&["-m", file.to_str().unwrap(), "-p", "hi"], args].concat(), ""));
        let path = format!("{}: ", file.display());
        error.strip_prefix(&path).unwrap_or_else(|| panic!("{error}")).to_owned()
    };
    assert!(open(&bytes[..bytes.len() - 1], &[]).starts_with("truncated"));
    let mut damaged = bytes.clone();
    *damaged.last_mut().unwrap() ^= 1;
    assert!(open(&damaged, &["--verify"]).starts_with("damaged: "));
    // Another file than the pinned one is refused whole as it is.
    let other = open(&bytes, &["--expect-root", &"0".repeat(64)]);
    assert!(other.starts_with("another file than expected: its root digest is "), "{other}");
    let mut damaged = bytes.clone();
    let at = damaged.windows(12).position(|text| text == b"<|im_start|>").unwrap();
    damaged[at] ^= 1;
    let section = open(&damaged, &[]);
    assert!(section.contains("section ") && section.contains("damaged"), "{section}");

    fs::remove_file(model.dir.path().join("tokenizer_config.json")).unwrap();
    assert!(error(&model.chat(&["-p", "hi"], "")).contains("has no chat template; --raw"));
    assert!(model.chat(&["-p", "hi", "--raw", "--max-new-tokens", "1"], "").status.success());
    fs::remove_file(model.dir.path().join("tokenizer.json")).unwrap();
    assert!(error(&model.chat(&["-p", "hi", "--raw"], "")).contains("has no tokenizer.json"));
}

#[test]
fn an_error_ends_a_piped_conversation_where_it_happens() {
    let model = ChatModel::greedy();
    let (fits, long) = ("hi\n", "the user ".repeat(300));
    let output = model.chat(&SHORT, &format!("{fits}{long}\n{fits}"));
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(output.stdout, stdout(model.chat(&SHORT, fits)).as_bytes());
    assert!(stderr(&output).starts_with("error: the prompt and what goes before it have "));
}

#[test]
fn wrong_usage_is_told_apart() {
    let model = ["-m", "model.mrt"];
    let usage_error = |args: &[&str], expected: &str| {
        let output = chat(args, "");
        let stderr = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(expected), "{args:?}: {stderr}");
    };
    usage_error(&[], "--model");
    usage_error(&["-m", "a", "--model-dir", "b"], "--model-dir");
    usage_error(&["--model-dir", "b", "--verify"], "--verify");
    for (args, expected) in [
        (&["--top-p", "2"][..], "top_p is 2; it must be above 0 and at most 1"),
        (&["--top-p", "many"], "not a number"),
        (&["--temperature", "-1"], "temperature is -1; it must be 0"),
        (&["--min-p", "NaN"], "min_p is NaN; it must be from 0 to 1"),
        (&["--repetition-penalty", "0"], "above 0"),
        (&["--threads", "0"], "from 1 to 1024"),
        (&["--ctx", "0"], "from 1"),
        (&["--max-new-tokens", "0"], "from 1"),
        (&["--greedy", "--top-k", "3"], "--greedy"),
        (&["--raw", "--system", "x"], "--raw"),
    ] {
        usage_error(&[&model, args].concat(), expected);
    }
}

#[test]
fn a_closed_pipe_ends_it_quietly() {
    let model = ChatModel::greedy();
    let mut child = Command::new(env!("CARGO_BIN_EXE_mruntime_chat"))
        .args(["--model-dir", model.dir(), "-p", "hi"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}
