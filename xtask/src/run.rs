//! `cargo xtask run`: from a fresh checkout to text.

use std::process::Command;

use clap::Args as ClapArgs;

use crate::{Error, model, setup, workspace};

/// Sets everything up, then generates text with the default model.
///
/// The first argument is the prompt; everything after it goes to `edgellm run`, whose options
/// `cargo xtask run -- --help` shows. With `-m` another model is used and none is fetched.
#[derive(Debug, ClapArgs)]
#[command(
    after_help = "Examples:\n  cargo xtask run -- \"Explain quantum computing:\"\n  \
    cargo xtask run -- \"Write a haiku about rain\" -n 60 --backend cpu\n  \
    cargo xtask run --cpu-only -- \"Hello\""
)]
pub struct Args {
    /// Build without the GPU backend: needs no GPU tool chain at all.
    #[arg(long)]
    cpu_only: bool,
    /// Prompt, then options of `edgellm run`.
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "PROMPT [OPTIONS]"
    )]
    arguments: Vec<String>,
}

/// Runs the task. Returns only if it fails: `edgellm` takes the process over.
pub fn run(args: &Args) -> Result<(), Error> {
    if args.arguments.is_empty() {
        return Err(Error::Usage(
            "no prompt; try: cargo xtask run -- \"Explain quantum computing:\"".into(),
        ));
    }
    let mut build = vec!["--release", "--package", "engine", "--bin", "edgellm"];
    if args.cpu_only {
        build.push("--no-default-features");
    } else {
        setup::core()?;
    }
    let model = if names_model(&args.arguments) || asks_for_help(&args.arguments) {
        None
    } else {
        Some(model::path_of(None)?)
    };
    let program = workspace::build_program(&build, "edgellm")?;
    let mut command = Command::new(&program);
    command.arg("run");
    if let Some(model) = model {
        command.arg("-m").arg(model);
    }
    command.args(with_prompt_flag(&args.arguments));
    Err(Error::io("cannot run", program)(workspace::replace_by(
        &mut command,
    )))
}

/// Puts `-i` in front of a leading prompt.
fn with_prompt_flag(arguments: &[String]) -> Vec<&str> {
    let is_prompt = arguments
        .first()
        .is_some_and(|first| !first.starts_with('-'));
    is_prompt
        .then_some("-i")
        .into_iter()
        .chain(arguments.iter().map(String::as_str))
        .collect()
}

fn names_model(arguments: &[String]) -> bool {
    arguments
        .iter()
        .any(|argument| argument.starts_with("-m") || argument.starts_with("--model"))
}

fn asks_for_help(arguments: &[String]) -> bool {
    arguments
        .iter()
        .any(|argument| matches!(argument.as_str(), "-h" | "--help"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(arguments: &[&str]) -> Vec<String> {
        arguments
            .iter()
            .map(|&argument| argument.to_owned())
            .collect()
    }

    #[test]
    fn a_leading_prompt_gets_its_flag() {
        assert_eq!(
            with_prompt_flag(&owned(&["Hi -n", "-n", "5"])),
            ["-i", "Hi -n", "-n", "5"]
        );
        assert_eq!(with_prompt_flag(&owned(&["-i", "Hi"])), ["-i", "Hi"]);
        assert!(with_prompt_flag(&[]).is_empty());
    }

    #[test]
    fn a_named_model_is_noticed() {
        assert!(names_model(&owned(&["Hi", "-m", "x.gguf"])));
        assert!(names_model(&owned(&["Hi", "--model=x.gguf"])));
        assert!(!names_model(&owned(&["-i", "model"])));
        assert!(asks_for_help(&owned(&["--help"])));
        assert!(!asks_for_help(&owned(&["help"])));
    }
}
