//! Chat with a model in a terminal.

#![forbid(unsafe_code)]

mod answer;
mod conversation;
mod options;

use std::io::{self, BufRead, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mr_cli::{Result, say};
use mruntime::{
    Isa, Limits, OpenOptions, Pool, Prefault, Sampler, Session, Verify, create_qwen2_arenas,
    qwen2_init_kv_cache, qwen2_init_scratch,
};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use answer::Answerer;
use conversation::Conversation;
use options::Cli;

const HELP: &str = "\
/reset   forget the conversation
/help    show this
/exit    leave; so does Ctrl-D
Ctrl-C   stop the answer; again before it has stopped, the program
Anything else goes to the model.";

fn main() -> ExitCode {
    mr_cli::exit_code(run(&mr_cli::parse::<Cli>()))
}

fn run(cli: &Cli) -> Result<()> {
    let decode_threads = cli.threads.unwrap_or_else(mruntime::performance_cores);
    let prefill_threads = cli.threads_batch.unwrap_or(decode_threads);
    let mut pool = Pool::new(decode_threads.max(prefill_threads))?;
    let verify = if cli.verify { Verify::Full } else { Verify::Header };
    // Weights that are on disk only come in while the rest starts, and while the user types.
    let prefault = Prefault::Background;
    let expected_root = cli.expect_root;
    let options = OpenOptions { verify, prefault, expected_root, ..OpenOptions::default() };
    let model = cli.model.open(&options, &mut pool)?;
    let cfg = *model.config();
    let defaults = model.generation()?;
    let tokenizer = model.tokenizer()?;
    let template = if cli.raw { None } else { Some(chat_template(&model)?) };

    let isa = Isa::detect();
    let limits = Limits { context: cli.context(&cfg), batch: answer::BATCH, threads: pool.threads() };
    let mut arenas = create_qwen2_arenas(&cfg, &limits)?;
    let kv = qwen2_init_kv_cache(&cfg, limits.context, &mut arenas.kv_cache.bump())?;
    let mut scratch = qwen2_init_scratch(&cfg, &limits, isa, &mut arenas.scratch.bump())?;
    let numerics = cli.numerics.get(isa)?;
    scratch.set_numerics(numerics);
    scratch.set_threads(prefill_threads, decode_threads);
    let sampling = cli.sampling(&defaults);
    let sampler = Sampler::new(sampling, cfg.vocab_size as usize, isa)?;

    let mut chat = Chat {
        conversation: Conversation::new(&tokenizer, template, cli.system.as_deref()),
        answerer: Answerer::new(
            Session::new(cfg, model.weights(), kv, scratch),
            sampler,
            pool,
            &tokenizer,
            defaults.stop_tokens,
            cli.max_new_tokens.unwrap_or(usize::MAX),
        ),
    };
    if let Some(prompt) = cli.prompt()? {
        chat.turn(&prompt)?;
    } else if io::stdin().is_terminal() && io::stdout().is_terminal() {
        say(format_args!("{}, context {}; /help lists the commands", model.name(), limits.context));
        chat.converse()?;
    } else {
        for line in io::stdin().lock().lines() {
            let line = line.map_err(|e| format!("standard input: {e}"))?;
            if !line.trim().is_empty() && !chat.command_or_turn(&line)? {
                break;
            }
        }
    }
    chat.answerer.print_speed(numerics);
    if sampling.temperature != 0.0 && cli.seed.is_none() {
        say(format_args!("seed: {}", sampling.seed));
    }
    Ok(())
}

fn chat_template(model: &mr_cli::LoadedModel) -> Result<mr_cli::TemplateSource> {
    let missing = || format!("{} has no chat template; --raw continues plain text", model.name());
    Ok(model.chat_template()?.ok_or_else(missing)?)
}

/// A conversation and what answers in it.
struct Chat<'a> {
    conversation: Conversation<'a>,
    answerer: Answerer<'a>,
}

impl Chat<'_> {
    /// Answers what the user types until they leave.
    fn converse(&mut self) -> Result<()> {
        let stop = Arc::new(AtomicBool::new(false));
        let handler_stop = Arc::clone(&stop);
        // The line editor takes Ctrl-C as a key: this is for the time of an answer. A batch of a prompt may take long.
        ctrlc::set_handler(move || {
            if handler_stop.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        })?;
        self.answerer.stop_when(stop);
        let mut editor = DefaultEditor::new()?;
        loop {
            let line = match editor.readline("> ") {
                Ok(line) if line.trim().is_empty() => continue,
                Ok(line) => line,
                Err(ReadlineError::Interrupted) => continue,
                Err(ReadlineError::Io(e)) if e.kind() == io::ErrorKind::InvalidData => {
                    say("error: what was typed is not UTF-8");
                    continue;
                }
                Err(ReadlineError::Eof) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            editor.add_history_entry(&line)?;
            match self.command_or_turn(&line) {
                Ok(true) => writeln!(io::stdout())?,
                Ok(false) => return Ok(()),
                Err(error) if error.is::<io::Error>() => return Err(error),
                // What was wrong with one message leaves the conversation as it was.
                Err(error) => say(format_args!("error: {error}")),
            }
        }
    }

    /// Does what the line says; false when it says to leave.
    fn command_or_turn(&mut self, line: &str) -> Result<bool> {
        match line.trim() {
            "/exit" => return Ok(false),
            "/reset" => self.conversation.reset(),
            "/help" => say(HELP),
            _ => self.turn(line)?,
        }
        Ok(true)
    }

    /// Answers one message on stdout.
    fn turn(&mut self, message: &str) -> Result<()> {
        if message.trim().is_empty() {
            return Err("the prompt is empty".into());
        }
        self.answerer.begin();
        let turn = self.conversation.turn(message)?;
        if let Some(answer) = self.answerer.answer(turn.tokens(), &mut io::stdout().lock())? {
            self.conversation.accept(turn, &answer);
        }
        Ok(())
    }
}
