//! The program under test, run as its users run it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, waitid};

use super::client::{self, Outcome};
use super::program::{self, Program};
use super::service::Rights;
use super::topology::{HOST_V4, HOST_V6};
use super::{Netns, world};

/// An address of the default fake range that no test ever asks for by name.
pub(crate) const UNKNOWN_FAKE: &str = "198.18.77.77:80";

/// A running `tunproxy --profile`. Dropping it kills it, as a crash would.
pub(crate) struct Tunproxy {
    program: Program,
    place: Place,
}

/// A profile and a state directory; a second run from the same place finds what the first left.
#[derive(Clone)]
pub(crate) struct Place {
    /// Where the profile lies.
    pub(crate) profile: PathBuf,
    /// What `--state-dir` is.
    pub(crate) state: PathBuf,
    /// The rights of its runs; those of whoever runs the test if there are none.
    pub(crate) rights: Option<Rights>,
}

impl Place {
    /// Writes `profile` to a fresh directory.
    ///
    /// # Panics
    /// If the lab's desk is full.
    pub(crate) fn new(profile: &str) -> Self {
        let dir = world::fresh_dir("tunproxy");
        let place = Self { profile: dir.join("profile.yaml"), state: dir.join("state"), rights: None };
        place.rewrite(profile);
        place
    }

    /// Puts another profile in its place.
    ///
    /// # Panics
    /// If the lab's desk is full.
    pub(crate) fn rewrite(&self, profile: &str) {
        fs::write(&self.profile, profile).expect("a file on the lab's desk");
    }

    /// The long run, in `ns`, not yet started.
    pub(crate) fn run_command(&self, ns: &Netns) -> Command {
        let mut command = self.program(ns);
        command.arg("--profile").arg(&self.profile).arg("--state-dir").arg(&self.state);
        command
    }

    /// Starts it and waits until it says that it is ready.
    ///
    /// # Errors
    /// All that it said, if it ended instead.
    pub(crate) fn try_start(&self, ns: &Netns) -> Result<Tunproxy, String> {
        self.try_start_by(self.run_command(ns))
    }

    /// The same by a command that comes to [`Place::run_command`].
    ///
    /// # Errors
    /// All that it said, if it ended instead.
    pub(crate) fn try_start_by(&self, command: Command) -> Result<Tunproxy, String> {
        let program = Program::start("tunproxy", command);
        program.wait_for(|line| line.starts_with("tunproxy ready"))?;
        Ok(Tunproxy { program, place: self.clone() })
    }

    /// Starts it and waits until it says that it is ready.
    ///
    /// # Panics
    /// With all that it said, if it ended instead.
    pub(crate) fn start(&self, ns: &Netns) -> Tunproxy {
        self.try_start(ns).unwrap_or_else(|said| panic!("{said}"))
    }

    /// `tunproxy cleanup`, which must succeed.
    ///
    /// # Panics
    /// With what it said, if it fails.
    pub(crate) fn clean_up(&self, ns: &Netns) -> String {
        let said = self.subcommand(ns, "cleanup", &["--state-dir".as_ref(), &self.state]);
        assert!(said.succeeded(), "cleanup: {said:?}");
        said.stdout + &said.stderr
    }

    /// `tunproxy check`.
    pub(crate) fn check(&self, ns: &Netns) -> Said {
        self.subcommand(ns, "check", &["--profile".as_ref(), &self.profile])
    }

    /// `tunproxy plan` or `tunproxy doctor`, with further options.
    pub(crate) fn look(&self, ns: &Netns, word: &str, options: &[&str]) -> Said {
        let mut command = ns.command(binary());
        command.arg(word).arg("--profile").arg(&self.profile).arg("--state-dir").arg(&self.state);
        Said::of(command.args(options))
    }

    /// Runs a program inside `tunproxy exec`.
    pub(crate) fn exec(&self, ns: &Netns, program: &str, args: &[&str]) -> Said {
        self.exec_with(ns, &[], program, args)
    }

    /// The same with further options of ours.
    pub(crate) fn exec_with(&self, ns: &Netns, options: &[&str], program: &str, args: &[&str]) -> Said {
        let mut command = self.exec_command(ns, options);
        command.arg(program).args(args);
        Said::of(&mut command)
    }

    /// `tunproxy` with a word, `status` or `stop`, for the run whose state directory this is.
    pub(crate) fn ask(&self, ns: &Netns, word: &str) -> Said {
        self.subcommand(ns, word, &["--state-dir".as_ref(), &self.state])
    }

    /// Does an act of [`client`] inside `tunproxy exec`.
    ///
    /// # Panics
    /// If the process says nothing of it.
    pub(crate) fn act(&self, ns: &Netns, words: &str) -> Outcome {
        let (program, args, environment) = world::client_command(words);
        let mut command = self.exec_command(ns, &[]);
        command.arg(program).args(args).envs(environment);
        let said = Said::of(&mut command);
        client::outcome(&said.stdout).unwrap_or_else(|| panic!("no outcome of `{words}`: {said:?}"))
    }

    /// Holds that `exec` puts a program where the host's own way out is not: what it reaches, it reaches through us.
    ///
    /// # Panics
    /// If it sees the host's addresses.
    pub(crate) fn assert_encloses(&self, ns: &Netns) {
        let said = self.exec(ns, "ip", &["-o", "addr"]);
        let encloses = said.succeeded() && !said.stdout.contains(HOST_V4) && !said.stdout.contains(HOST_V6);
        assert!(encloses, "{said:?}");
    }

    /// `tunproxy exec` with further options of ours, up to where the program's words begin.
    pub(crate) fn exec_command(&self, ns: &Netns, options: &[&str]) -> Command {
        let mut command = ns.command(binary());
        command.arg("exec").arg("--profile").arg(&self.profile).arg("--state-dir").arg(&self.state);
        command.args(options).arg("--");
        command
    }

    fn program(&self, ns: &Netns) -> Command {
        self.rights.as_ref().map_or_else(|| ns.command(binary()), |rights| rights.command(ns, self))
    }

    fn subcommand(&self, ns: &Netns, name: &str, args: &[&Path]) -> Said {
        let mut command = self.program(ns);
        command.arg(name).args(args);
        Said::of(&mut command)
    }
}

impl Tunproxy {
    /// Asks it to stop as systemd would, and waits for its end.
    pub(crate) fn stop(mut self) -> ExitStatus {
        self.program.signal(Signal::SIGTERM);
        self.program.wait()
    }

    /// Waits for an end that was not asked for here.
    pub(crate) fn wait(mut self) -> ExitStatus {
        self.program.wait()
    }

    /// Kills it with no chance to clean up. What is left is for [`Place::clean_up`].
    pub(crate) fn kill(mut self) -> Place {
        self.program.signal(Signal::SIGKILL);
        self.program.wait();
        self.place.clone()
    }

    /// Holds that the traffic of `ns` comes to us: only we refuse an address of the fake range that nobody was given,
    /// everybody else has no route to it.
    ///
    /// # Panics
    /// If it does not.
    pub(crate) fn assert_carries(&self, ns: &Netns) {
        let outcome = client::act_in(ns, &format!("connect {UNKNOWN_FAKE}"));
        assert_eq!(outcome, Err("ECONNREFUSED".to_owned()), "is the traffic ours?\n{}", self.output());
    }

    /// Where it runs from.
    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    /// Leaves it this many file descriptors, whatever it had.
    ///
    /// # Panics
    /// If it has ended.
    pub(crate) fn limit_descriptors(&self, ns: &Netns, many: usize) {
        let pid = self.program.pid().to_string();
        ns.run("prlimit", &["--pid", &pid, &format!("--nofile={many}:{many}")]);
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> nix::unistd::Pid {
        self.program.pid()
    }

    /// Its resident memory in bytes.
    pub(crate) fn resident(&self) -> u64 {
        self.status_field("status", "VmRSS:") * 1024
    }

    /// How often its threads have gone to sleep, and so will have woken: voluntary context switches.
    pub(crate) fn wakeups(&self) -> u64 {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.program.pid())).expect("its threads");
        let names = tasks.flatten().map(|task| task.file_name().to_string_lossy().into_owned());
        names.map(|task| self.status_field(&format!("task/{task}/status"), "voluntary_ctxt_switches:")).sum()
    }

    /// For how long all its threads together have run and have waited for a processor, in that order (proc(5), schedstat).
    pub(crate) fn processor_time(&self) -> (Duration, Duration) {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.program.pid())).expect("its threads");
        let times = tasks.flatten().filter_map(|task| {
            // A thread may end meanwhile.
            let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
            let mut words = text.split_whitespace().map(|word| word.parse().map(Duration::from_nanos));
            Some((words.next()?.ok()?, words.next()?.ok()?))
        });
        times.fold(<(Duration, Duration)>::default(), |(run, waited), (more, longer)| (run + more, waited + longer))
    }

    /// The descriptors that it has open.
    pub(crate) fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.program.pid())).expect("its descriptors").count()
    }

    fn status_field(&self, file: &str, name: &str) -> u64 {
        let path = format!("/proc/{}/{file}", self.program.pid());
        let status = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name}"));
        line.split_whitespace().next().and_then(|number| number.parse().ok()).expect("a number")
    }

    /// A number of `tunproxy status` by its path, like `["packets", "spoofed"]`.
    pub(crate) fn counted(&self, ns: &Netns, path: &[&str]) -> u64 {
        let said = self.place.ask(ns, "status");
        let status: serde_json::Value = serde_json::from_str(&said.stdout).unwrap_or_else(|_| panic!("{said:?}"));
        let found = path.iter().fold(&status, |value, key| &value[key]);
        found.as_u64().unwrap_or_else(|| panic!("{path:?}: {status}"))
    }

    /// Sends it a signal that it survives.
    pub(crate) fn signal(&self, signal: Signal) {
        self.program.signal(signal);
    }

    /// Stops it as it stands, and returns when the last of its threads stands still; SIGCONT lets it go on.
    ///
    /// # Panics
    /// If it has ended.
    pub(crate) fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
        let pid = self.program.pid();
        // A parent is told of a stop when all threads have (signal(7), wait(2)).
        while waitid(Id::Pid(pid), WaitPidFlag::WSTOPPED) == Err(Errno::EINTR) {}
    }

    /// Does `act` and returns the first line, said since, that holds every one of `words`: a flow's line, say.
    ///
    /// # Panics
    /// With all that it said, if there is none.
    pub(crate) fn line_after<T>(&self, act: impl FnOnce() -> T, words: &[&str]) -> (T, String) {
        let from = self.program.line_count();
        let done = act();
        let line = self.program.wait_after(from, |line| words.iter().all(|word| line.contains(word)));
        (done, line.unwrap_or_else(|said| panic!("no line with {words:?}: {said}")))
    }

    /// The first line with `words`, already said or to come: what goes to the log may be read after `ready`.
    ///
    /// # Panics
    /// With all that it said, if there is none.
    pub(crate) fn line(&self, words: &str) -> String {
        let line = self.program.wait_for(|line| line.contains(words));
        line.unwrap_or_else(|said| panic!("no line with {words:?}: {said}"))
    }

    /// All that it has said.
    pub(crate) fn output(&self) -> String {
        self.program.output()
    }
}

/// What a program that has ended said.
#[derive(Debug)]
pub(crate) struct Said {
    /// Its exit code; `None` if a signal ended it.
    pub(crate) code: Option<i32>,
    /// What it wrote to stdout.
    pub(crate) stdout: String,
    /// What it wrote to stderr.
    pub(crate) stderr: String,
}

impl Said {
    /// Runs `command` to its end.
    pub(crate) fn of(command: &mut Command) -> Self {
        let output = program::output(command);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }

    /// Whether it ended with 0.
    pub(crate) fn succeeded(&self) -> bool {
        self.code == Some(0)
    }
}

/// The program under test.
pub(crate) fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_tunproxy"))
}
