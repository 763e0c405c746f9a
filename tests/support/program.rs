//! Programs of the lab: started, read line by line, waited for without sleeping, ended with all their children.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// How long a program may take to say or do what is awaited. Not a measure: only a hang ever takes that long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The same for a program that has work to do before it ends.
const LONG_PATIENCE: Duration = Duration::from_secs(120);

/// A running program whose output is kept. Dropping it kills its whole process group and reaps it.
pub(crate) struct Program {
    name: String,
    child: Child,
    said: Arc<Said>,
    readers: Vec<JoinHandle<()>>,
}

/// What a program has written to stdout and stderr so far, in the order it was read.
#[derive(Default)]
struct Said {
    state: Mutex<Lines>,
    more: Condvar,
}

#[derive(Default)]
struct Lines {
    lines: Vec<String>,
    closed: usize,
}

impl Program {
    /// Starts `command` in a process group of its own.
    ///
    /// # Panics
    /// If it cannot be started.
    pub(crate) fn start(name: &str, mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let said = Arc::new(Said::default());
        let (stdout, stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let readers = vec![collect(stdout, &said), collect(stderr, &said)];
        Self { name: name.to_owned(), child, said, readers }
    }

    /// Waits for a line that `wanted` accepts, among those already said too, and returns it.
    ///
    /// # Errors
    /// All that the program said, if it closed its output or said nothing of the kind for [`PATIENCE`].
    pub(crate) fn wait_for(&self, wanted: impl Fn(&str) -> bool) -> Result<String, String> {
        self.wait_after(0, wanted)
    }

    /// Like [`Program::wait_for`], from line number `from` on: see [`Program::line_count`].
    ///
    /// # Errors
    /// All that the program said.
    pub(crate) fn wait_after(&self, from: usize, wanted: impl Fn(&str) -> bool) -> Result<String, String> {
        self.search(from, PATIENCE, wanted)
    }

    fn search(&self, mut from: usize, limit: Duration, wanted: impl Fn(&str) -> bool) -> Result<String, String> {
        let end = Instant::now() + limit;
        let mut state = self.said.lock();
        loop {
            if let Some(line) = state.lines.iter().skip(from).find(|line| wanted(line)) {
                return Ok(line.clone());
            }
            from = from.max(state.lines.len());
            let left = end.saturating_duration_since(Instant::now());
            if state.closed == 2 || left.is_zero() {
                return Err(format!("{} never said it; it said:\n{}", self.name, state.lines.join("\n")));
            }
            state = self.said.more.wait_timeout(state, left).expect("no panic while held").0;
        }
    }

    /// Waits for such a line no longer than `limit`.
    pub(crate) fn wait_at_most(&self, limit: Duration, wanted: impl Fn(&str) -> bool) -> Option<String> {
        self.search(0, limit, wanted).ok()
    }

    /// How many lines it has said.
    pub(crate) fn line_count(&self) -> usize {
        self.said.lock().lines.len()
    }

    /// All that it has said.
    pub(crate) fn output(&self) -> String {
        self.said.lock().lines.join("\n")
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"))
    }

    /// Sends `signal` to the process alone.
    ///
    /// # Panics
    /// If it is gone.
    pub(crate) fn signal(&self, signal: Signal) {
        nix::sys::signal::kill(self.pid(), signal).expect("a running program");
    }

    /// Waits for its end, and for the last line of its output.
    ///
    /// # Panics
    /// If it has not ended after [`PATIENCE`].
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let status = wait_at_most(&mut self.child, PATIENCE);
        let status = status.unwrap_or_else(|| panic!("{} does not end; it said:\n{}", self.name, self.output()));
        self.end_group();
        status
    }

    /// Ends what it left in its group, then reads what is left of the output.
    fn end_group(&mut self) {
        let _ = killpg(self.pid(), Signal::SIGKILL);
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = killpg(self.pid(), Signal::SIGKILL);
        let _ = self.child.wait();
        self.end_group();
    }
}

impl Said {
    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.state.lock().expect("no panic while held")
    }
}

fn collect(stream: impl Read + Send + 'static, said: &Arc<Said>) -> JoinHandle<()> {
    let said = said.clone();
    thread::spawn(move || {
        let mut reader = BufReader::new(stream);
        let mut line = Vec::new();
        while matches!(reader.read_until(b'\n', &mut line), Ok(1..)) {
            said.lock().lines.push(String::from_utf8_lossy(&line).trim_end().to_owned());
            said.more.notify_all();
            line.clear();
        }
        said.lock().closed += 1;
        said.more.notify_all();
    })
}

/// Waits for `child` at most `limit`: a thread sits in `waitid` and leaves the reaping to the caller.
fn wait_at_most(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    use nix::sys::wait::{Id, WaitPidFlag, waitid};
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
    let (ended, end) = std::sync::mpsc::channel();
    thread::spawn(move || {
        while waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) == Err(nix::errno::Errno::EINTR) {}
        let _ = ended.send(());
    });
    end.recv_timeout(limit).ok()?;
    child.wait().ok()
}

/// Reads a child with piped output to its end; kills it after `limit`. `None` says that it had to be killed.
pub(crate) fn finish(mut child: Child, limit: Duration) -> (Option<ExitStatus>, String) {
    let said = Arc::new(Said::default());
    let (stdout, stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let readers = [collect(stdout, &said), collect(stderr, &said)];
    let status = wait_at_most(&mut child, limit);
    if status.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    for reader in readers {
        let _ = reader.join();
    }
    let output = said.lock().lines.join("\n");
    (status, output)
}

/// Runs `command` to its end, and ends what it leaves behind.
///
/// # Panics
/// If it cannot be started, or has not ended after [`LONG_PATIENCE`].
pub(crate) fn output(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let group = Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
    let (stdout, stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let readers = (read_all(stdout), read_all(stderr));
    let status = wait_at_most(&mut child, LONG_PATIENCE);
    let _ = killpg(group, Signal::SIGKILL);
    let _ = child.wait();
    let (stdout, stderr) = (readers.0.join().expect("a reader"), readers.1.join().expect("a reader"));
    let said = || format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    let status = status.unwrap_or_else(|| panic!("{command:?} does not end; it said:\n{}", said()));
    Output { status, stdout, stderr }
}

fn read_all(mut stream: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        bytes
    })
}
