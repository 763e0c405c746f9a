//! Arguments, logging, signals, exit code.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use clap::{CommandFactory, Parser};
use tracing_subscriber::EnvFilter;

use tunproxy::app;
use tunproxy::cli::{Cli, Command, Common, Format, Level};
use tunproxy::profile::{Diagnostic, LogLevel, Profile, Severity};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let format = cli.common.log_format;
    match run(cli) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let error = format!("{error:#}");
            let line = match format {
                Format::Text => format!("tunproxy: {error}"),
                Format::Json => {
                    serde_json::json!({"level": "ERROR", "target": "tunproxy", "message": error}).to_string()
                }
            };
            say(&mut std::io::stderr(), &line);
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<u8> {
    let common = &cli.common;
    match cli.command {
        None => {
            let profile = profile(common)?;
            app::run(&profile, &state_dir(common)?).map(|()| 0)
        }
        Some(Command::Check) => check(common),
        Some(Command::Exec { command }) => {
            let profile = profile(common)?;
            app::exec(&profile, &command)
        }
        Some(Command::Demo) => {
            if common.log_level.is_some() {
                start_log(common, LogLevel::Silent);
            }
            app::demo()
        }
        Some(Command::DemoClient) => app::demo_client().map(|()| 0),
        Some(Command::Cleanup) => {
            start_log(common, LogLevel::Info);
            let report = app::cleanup(&state_dir(common)?)?;
            say(&mut std::io::stdout(), &report);
            Ok(0)
        }
        Some(Command::Status) => talk(common, app::Command::Status),
        Some(Command::Stop) => talk(common, app::Command::Stop),
        Some(Command::Completions { shell }) => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "tunproxy", &mut script);
            print(&script);
            Ok(0)
        }
        Some(Command::Man) => {
            let mut page = Vec::new();
            clap_mangen::Man::new(Cli::command()).render(&mut page)?;
            print(&page);
            Ok(0)
        }
        Some(Command::Inside { channel, description, command }) => Err(app::inside(channel, &description, command)),
    }
}

/// The profile that `--profile` names, after everything that is wrong with it was said. Starts the log as it says.
fn profile(common: &Common) -> anyhow::Result<Profile> {
    let path = profile_path(common)?;
    let loaded = app::load(path);
    start_log(common, loaded.profile.as_ref().map_or(LogLevel::Info, |profile| profile.log_level));
    match common.log_format {
        Format::Text => {
            let text = loaded.report.to_string();
            if !text.is_empty() {
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
    let report = app::check(path).report;
    let stdout = &mut std::io::stdout();
    match common.log_format {
        Format::Text => {
            let text = report.to_string();
            if !text.is_empty() {
                say(stdout, text.trim_end());
            }
            let verdict = if report.has_errors() { "has errors and cannot be run" } else { "can be run" };
            say(stdout, &format!("{}: the profile {verdict}", path.display()));
        }
        // One object a line, and nothing else: no line means that there is nothing to say.
        Format::Json => report.diagnostics().into_iter().for_each(|it| say(stdout, &report.json(it).to_string())),
    }
    Ok(u8::from(report.has_errors()))
}

fn profile_path(common: &Common) -> anyhow::Result<&Path> {
    common.profile.as_deref().context("which profile? Name it with --profile FILE, or try `tunproxy demo`")
}

fn state_dir(common: &Common) -> anyhow::Result<PathBuf> {
    if let Some(dir) = &common.state_dir {
        return Ok(dir.clone());
    }
    if nix::unistd::geteuid().is_root() {
        return Ok("/var/lib/tunproxy".into());
    }
    let base = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let base = base.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".local/state")));
    Ok(base.context("neither XDG_STATE_HOME nor HOME is set; name a directory with --state-dir")?.join("tunproxy"))
}

fn talk(common: &Common, command: app::Command) -> anyhow::Result<u8> {
    let answer = app::ask(&state_dir(common)?, command)?;
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
