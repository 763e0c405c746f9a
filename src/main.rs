//! Arguments, logging, signals, exit code.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use tracing_subscriber::EnvFilter;

use tunproxy::app;
use tunproxy::cli::{Cli, Command, Common, Format, Internal, Level};
use tunproxy::profile::{Diagnostic, LogLevel, Profile, Severity};

fn main() -> ExitCode {
    if let Some(internal) = Internal::parse_if_meant() {
        return end(run_internal(internal), Format::Text);
    }
    let cli = Cli::parse();
    let format = cli.common.log_format;
    end(run(cli), format)
}

/// The exit code of `outcome`, after what went wrong was said.
fn end(outcome: anyhow::Result<u8>, format: Format) -> ExitCode {
    let error = match outcome {
        Ok(code) => return ExitCode::from(code),
        Err(error) => error,
    };
    let text = told(&error);
    let line = match format {
        Format::Text => format!("tunproxy: {text}"),
        Format::Json => serde_json::json!({"level": "ERROR", "target": "tunproxy", "message": text}).to_string(),
    };
    say(&mut std::io::stderr(), &line);
    ExitCode::from(app::exit_code(&error))
}

/// What failed, and that a kill switch is closed, if one is: nobody would look for that there.
fn with_note(error: &anyhow::Error, state: &Path) -> anyhow::Error {
    let told = told(error);
    match app::closed_note(state) {
        Some(note) => {
            let end = if told.ends_with(['.', '?']) { "" } else { "." };
            anyhow!("{told}{end} {note}")
        }
        None => anyhow!(told),
    }
}

/// What failed, why, and what to do where it is this process that lacks something.
fn told(error: &anyhow::Error) -> String {
    let words = in_words(error);
    app::descriptors_note(error).map_or_else(|| words.clone(), |note| format!("{words}. {note}"))
}

/// What failed and why. Most errors of the library tell their cause themselves; it is not said twice.
fn in_words(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |told, cause| match told.as_str() {
        "" => cause,
        _ if told.contains(&cause) => told,
        _ => told + ": " + &cause,
    })
}

fn run_internal(internal: Internal) -> anyhow::Result<u8> {
    match internal {
        Internal::DemoClient => app::demo_client().map(|()| 0),
        Internal::Inside { channel, description, command } => app::inside(channel, &description, command),
    }
}

fn run(cli: Cli) -> anyhow::Result<u8> {
    let common = &cli.common;
    app::begin()?;
    match cli.command {
        None => {
            let state = state_dir(common)?;
            let ran = profile(common).and_then(|profile| app::run(&profile, &state));
            ran.map(|()| 0).map_err(|error| with_note(&error, &state))
        }
        Some(Command::Check) => check(common),
        Some(Command::Plan) => plan(common),
        Some(Command::Doctor) => doctor(common),
        Some(Command::Exec { command }) => {
            // What looks like an option of ours is none, and no program is called so.
            if let Some(word) = command.first().filter(|word| word.as_encoded_bytes().starts_with(b"-")) {
                let said = format!("`{}` is no option of `exec`, and no command", word.display());
                Cli::command().error(ErrorKind::UnknownArgument, said).exit();
            }
            let profile = profile_of(common, app::WITHOUT_MEANING_IN_EXEC)?;
            app::exec(&profile, &command)
        }
        Some(Command::Demo) => {
            if common.log_level.is_some() {
                start_log(common, LogLevel::Silent);
            }
            app::demo()
        }
        Some(Command::Cleanup { namespace_gone }) => {
            start_log(common, LogLevel::Info);
            let state = state_dir(common)?;
            let cleaned = app::cleanup(&state, common.state_dir.is_some(), namespace_gone);
            let cleaned = cleaned.map_err(|error| with_note(&error, &state))?;
            say(&mut std::io::stdout(), &cleaned.said);
            cleaned.but.iter().for_each(|but| say(&mut std::io::stderr(), but));
            Ok(cleaned.exit_code())
        }
        Some(Command::Status) => talk(common, app::Command::Status),
        Some(Command::Stop) => talk(common, app::Command::Stop),
        Some(Command::Completions { shell }) => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "tunproxy", &mut script);
            print(&script);
            Ok(0)
        }
        Some(Command::Man { dir: Some(dir) }) => {
            clap_mangen::generate_to(Cli::command(), &dir)
                .with_context(|| format!("cannot write manual pages to {}", dir.display()))?;
            Ok(0)
        }
        Some(Command::Man { dir: None }) => {
            let mut page = Vec::new();
            clap_mangen::Man::new(Cli::command().disable_help_subcommand(true)).render(&mut page)?;
            print(&page);
            Ok(0)
        }
    }
}

/// The profile that `--profile` names, after everything that is wrong with it was said. Starts the log as it says.
fn profile(common: &Common) -> anyhow::Result<Profile> {
    profile_of(common, &[])
}

/// The same without warnings on `keys`, which mean nothing for what is done with it.
fn profile_of(common: &Common, keys: &[&str]) -> anyhow::Result<Profile> {
    let path = profile_path(common)?;
    let mut loaded = app::load(path);
    loaded.report.pass_over(keys);
    start_log(common, loaded.profile.as_ref().map_or(LogLevel::Info, |profile| profile.log_level));
    match common.log_format {
        Format::Text => {
            let text = loaded.report.to_string();
            let wanted = loaded.report.has_errors() || !matches!(common.log_level, Some(Level::Error | Level::Silent));
            if wanted && !text.is_empty() {
                say(&mut std::io::stderr(), text.trim_end());
            }
        }
        Format::Json => loaded.report.diagnostics().into_iter().for_each(|it| log(path, it)),
    }
    match loaded.profile {
        Some(profile) if !loaded.report.has_errors() => Ok(profile),
        _ => Err(anyhow!("the profile {} cannot be run; nothing was changed", path.display())),
    }
}

/// One mistake of a profile as an event, for programs that read the log.
fn log(path: &Path, mistake: &Diagnostic) {
    let file = path.display();
    let (line, column) = (mistake.place.at.line, mistake.place.at.column);
    let Diagnostic { path: key, message, hint, .. } = mistake;
    match mistake.severity {
        Severity::Warning => tracing::warn!(target: "profile", %file, line, column, key, hint, "{message}"),
        Severity::Error => tracing::error!(target: "profile", %file, line, column, key, hint, "{message}"),
    }
}

fn check(common: &Common) -> anyhow::Result<u8> {
    let path = profile_path(common)?;
    let app::Loaded { profile, report } = app::check(path);
    let stdout = &mut std::io::stdout();
    match common.output() {
        Format::Text => {
            let text = report.to_string();
            if !text.is_empty() {
                say(stdout, text.trim_end());
            }
            for note in profile.iter().filter(|_| !report.has_errors()).flat_map(app::host_notes) {
                say(stdout, &format!("this host: {note}"));
            }
            let verdict = if report.has_errors() { "has errors and cannot be run" } else { "can be run" };
            say(stdout, &format!("{}: the profile {verdict}", path.display()));
        }
        // One object a line, and nothing else: no line means that there is nothing to say.
        Format::Json => report.json_lines().into_iter().for_each(|line| say(stdout, &line.to_string())),
    }
    Ok(u8::from(report.has_errors()))
}

fn plan(common: &Common) -> anyhow::Result<u8> {
    let state = state_dir(common)?;
    let outline = match &common.profile {
        Some(file) => app::plan(&profile(common)?, file, &state)?,
        None => app::plan_in_force(&state)?,
    };
    match common.output() {
        Format::Text => print(outline.to_string().as_bytes()),
        Format::Json => say(&mut std::io::stdout(), &serde_json::to_string_pretty(&outline)?),
    }
    Ok(outline.exit_code())
}

fn doctor(common: &Common) -> anyhow::Result<u8> {
    let diagnosis = app::doctor(common.profile.as_deref(), &state_dir(common)?)?;
    match common.output() {
        Format::Text => print(diagnosis.to_string().as_bytes()),
        Format::Json => say(&mut std::io::stdout(), &serde_json::to_string_pretty(&diagnosis)?),
    }
    Ok(diagnosis.exit_code())
}

fn profile_path(common: &Common) -> anyhow::Result<&Path> {
    common.profile.as_deref().context("which profile? Name it with --profile FILE, or try `tunproxy demo`")
}

fn state_dir(common: &Common) -> anyhow::Result<PathBuf> {
    if let Some(dir) = &common.state_dir {
        return Ok(dir.clone());
    }
    if nix::unistd::geteuid().is_root() {
        return Ok(app::STATE_OF_ROOT.into());
    }
    let base = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let base = base.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".local/state")));
    Ok(base.context("neither XDG_STATE_HOME nor HOME is set; name a directory with --state-dir")?.join("tunproxy"))
}

fn talk(common: &Common, command: app::Command) -> anyhow::Result<u8> {
    let state = state_dir(common)?;
    let answer = app::ask(&state, command).map_err(|error| with_note(&error, &state))?;
    say(&mut std::io::stdout(), &serde_json::to_string_pretty(&answer)?);
    Ok(u8::from(answer.get("error").is_some()))
}

fn start_log(common: &Common, profile: LogLevel) {
    let level = match (common.log_level, profile) {
        (Some(Level::Silent), _) | (None, LogLevel::Silent) => "off",
        (Some(Level::Error), _) | (None, LogLevel::Error) => "error",
        (Some(Level::Warning), _) | (None, LogLevel::Warning) => "warn",
        (Some(Level::Info), _) | (None, LogLevel::Info) => "info",
        (Some(Level::Debug), _) | (None, LogLevel::Debug) => "tunproxy=debug,flow=debug,info",
    };
    let colours = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(level))
        .with_ansi(colours)
        .with_writer(std::io::stderr);
    match common.log_format {
        Format::Text => log.init(),
        Format::Json => log.json().flatten_event(true).init(),
    }
}

/// Writes to stdout. A reader that has had enough, like `head`, is no reason to fail.
fn print(bytes: &[u8]) {
    let mut stdout = std::io::stdout();
    let _ = stdout.write_all(bytes).and_then(|()| stdout.flush());
}

/// Writes one line. A reader that has gone is no reason to fail.
fn say(to: &mut dyn Write, line: &str) {
    let _ = writeln!(to, "{line}");
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::in_words;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot listen: {source}")]
    struct Telling {
        source: std::io::Error,
    }

    #[test]
    fn a_cause_is_told_once_whether_or_not_its_effect_tells_it() {
        let telling = || Telling { source: std::io::Error::other("in use") };
        assert_eq!(in_words(&telling().into()), "cannot listen: in use");
        let context = Err::<(), _>(telling()).context("port 80").unwrap_err();
        assert_eq!(in_words(&context), "port 80: cannot listen: in use");
        assert_eq!(in_words(&anyhow!("in use").context("port 80")), "port 80: in use");
    }
}
