//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// A transparent proxy for Linux that can say why a flow went where it went.
///
/// Takes this host's traffic (or a home network's) through a TUN device, matches each flow against the rules of a
/// Clash profile, and sends it direct, through a proxy, or nowhere.
#[derive(Debug, Parser)]
#[command(name = "tunproxy", version, args_conflicts_with_subcommands = false, after_long_help = EXAMPLES)]
pub struct Cli {
    /// Options that every command understands.
    #[command(flatten)]
    pub common: Common,
    /// What to do; running the profile when nothing is said.
    #[command(subcommand)]
    pub command: Option<Command>,
}

const EXAMPLES: &str = "\
Examples:
  tunproxy demo                                            see it work; no root, nothing to configure
  tunproxy check --profile rules.yaml                      is the profile right?
  tunproxy plan --profile rules.yaml                       what would a run change on this host?
  tunproxy exec --profile rules.yaml -- curl example.com   one program behind the rules, no root
  sudo tunproxy --profile rules.yaml                       the whole host, until Ctrl-C
  sudo tunproxy doctor --profile rules.yaml                what is wrong here, and what to do?
  sudo tunproxy cleanup                                    after a crash: put the host back

Exit codes: 0 done, and all is well; 1 it failed, or the answer is no; 2 wrong arguments; 3 (plan, doctor) not everything
could be looked at. `exec` ends with the code of its command, with 127 if that was not found, 126 if it cannot be run, and
128 + n if signal n ended it.";

const CHECK_EXAMPLE: &str = "\
Example:
  tunproxy check --profile profiles/desktop.yaml";

const PLAN_EXAMPLE: &str = "\
Example:
  tunproxy plan --profile profiles/desktop.yaml";

const DOCTOR_EXAMPLE: &str = "\
Example:
  sudo tunproxy doctor --profile profiles/desktop.yaml";

const EXEC_EXAMPLE: &str = "\
Example:
  tunproxy exec --profile rules.yaml -- curl -v https://example.com/";

/// Options that every command understands.
#[derive(Debug, Args)]
pub struct Common {
    /// The profile: a Clash/mihomo YAML file
    #[arg(long, short = 'f', global = true, value_name = "FILE")]
    pub profile: Option<PathBuf>,
    /// Where the journal, the fake-IP log and the control socket live, in a directory that nobody else may write to [default:
    /// /var/lib/tunproxy for root, else $XDG_STATE_HOME/tunproxy]
    #[arg(long, global = true, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// How much to log [default: what the profile says, else info]
    #[arg(long, global = true, value_name = "LEVEL")]
    pub log_level: Option<Level>,
    /// How log lines look
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub log_format: Format,
    /// How `check`, `plan` and `doctor` print what they found [default: as --log-format]
    #[arg(long, global = true, value_name = "FORMAT")]
    pub format: Option<Format>,
}

impl Common {
    /// How what was asked for is printed on stdout.
    #[must_use]
    pub fn output(&self) -> Format {
        self.format.unwrap_or(self.log_format)
    }
}

/// How much to log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Level {
    /// Nothing.
    Silent,
    /// What failed.
    Error,
    /// What may fail.
    Warning,
    /// Also a line for each flow.
    Info,
    /// Also why.
    Debug,
}

/// How log lines and findings look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Read a profile and say everything that is wrong with it; exit code 0 if it can be run, else 1
    #[command(after_help = CHECK_EXAMPLE)]
    Check,
    /// Print every change that a run would make on this host now, and what undoes it; make none
    ///
    /// While tunproxy runs with the same --state-dir, these are the changes that it has made; then no profile is needed.
    /// Without privileges the firewall's rules are not seen, which is said. The exit code is 1 if a start would be refused,
    /// and 3 if not everything could be looked at.
    #[command(after_help = PLAN_EXAMPLE)]
    Plan,
    /// Look at this host, whether tunproxy runs on it or not, and say what is wrong and what to do; change nothing
    ///
    /// With a profile it also says whether that can run here and whether its proxies and nameservers answer. Without
    /// privileges it looks as far as it can, and says what it did not see. The exit code is 1 if something does not work,
    /// and 3 if nothing was found and not everything could be looked at.
    #[command(after_help = DOCTOR_EXAMPLE)]
    Doctor,
    /// Run one command in a private network namespace whose only way out is the profile; needs no root
    ///
    /// Signals are passed on. The exit code is the command's, 128 + n if signal n ended it, 127 if it was not found,
    /// 126 if it cannot be run.
    #[command(after_help = EXEC_EXAMPLE)]
    Exec {
        /// The command and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
    /// Show the main job in a private namespace with its own small internet; needs no root and no network
    Demo,
    /// Put the host back after a crash, as the journal in the state directory says
    Cleanup {
        /// Forget what was changed in another network namespace, because that namespace is gone: a container's, after
        /// its restart
        #[arg(long)]
        namespace_gone: bool,
    },
    /// What the running program does, as JSON
    Status,
    /// Stop the running program
    Stop,
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write those of all commands to a directory
    Man {
        /// Where to write tunproxy.1, tunproxy-check.1 and the others
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
}

/// What this program calls itself with. Apart from [`Cli`], so that no help, page or completion shows it.
#[derive(Debug, Parser)]
pub enum Internal {
    /// The program inside `demo` that makes the requests.
    DemoClient,
    /// The child half of `exec`.
    Inside {
        /// The descriptor that leads to the parent.
        channel: i32,
        /// The namespace, as JSON.
        description: String,
        /// What to become.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
}

impl Internal {
    /// Reads the arguments if they begin with one of these words.
    #[must_use]
    pub fn parse_if_meant() -> Option<Self> {
        let first = std::env::args_os().nth(1)?;
        Self::has_subcommand(first.to_str()?).then(Self::parse)
    }
}
