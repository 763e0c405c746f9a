//! The foreground run: everything up, `ready`, and on a signal everything back.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, LocalSet, spawn_local};

use super::build::{self, Addresses, Outside};
use super::control::{Answers, Control};
use super::guard::{Board, Guard};
use super::keeper::{Keeper, Kept};
use super::limits::{enough_descriptors, raise_descriptor_limit};
use super::nameservers::{is_here, open_resolver};
use super::refusal::explain_tun;
use super::signals::Signals;
use super::turn::beside;
use super::worker::{self, Drain, Seed, Worker};
use super::{rights, status, supervisor};
use crate::dispatch::Core;
use crate::dns;
use crate::inbound::{Access, Listener};
use crate::platform::{
    Applied, Dialer, FOUND_OPEN, Fwmark, HostError, HostOptions, HostPlan, Journal, NftState, OwnSockets, Proof,
    Report, Survey, TunQueue, Turn, Wishes, ask_ahead, gates_in_the_way, open_tun, unblock_signals,
};
use crate::profile::{DEVICE, Profile};
use crate::session::Inbound;

/// More queues than this spread flows thinner than their bookkeeping is worth.
const MOST_WORKERS: usize = 8;
/// The fake-IP log, below the state directory.
const FAKE_IP_LOG: &str = "fake-ip.log";
/// How long the end of a run waits for a disk.
const LAST_WRITE: Duration = Duration::from_secs(5);
/// How long flows may finish at a stop.
const DRAIN: Drain = Drain { quiet: Duration::from_millis(500), most: Duration::from_secs(3) };

/// Runs `profile` until a signal or the command `stop`, with its state in `state`. When it returns, the host is as it
/// was before; after an error too.
///
/// # Errors
/// What could not be set up, and what to do about it; or what failed while running.
pub fn run(profile: &Profile, state: &Path) -> anyhow::Result<()> {
    raise_descriptor_limit();
    enough_descriptors(if profile.tun.enable { workers_wanted() } else { 1 })?;
    // Whoever started us may have had some blocked: a stop must come through.
    unblock_signals()?;
    let profile = &rights::within(profile)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = LocalSet::new().block_on(&runtime, Run { profile, state }.go());
    // What still waits for a disk is nothing to wait for: it writes beside its file, and renames at the end.
    runtime.shutdown_timeout(LAST_WRITE);
    outcome
}

/// What in the firewall stands in the way of `profile` on this host, and more where others use it as their gateway, as far as
/// this user may look. Changes nothing.
#[must_use]
pub fn host_notes(profile: &Profile) -> Vec<String> {
    let run = Run { profile, state: Path::new("") };
    if !profile.tun.enable || !profile.tun.auto_route {
        return Vec::new();
    }
    let Ok(survey) = Survey::take() else { return Vec::new() };
    let options = run.options(run.device_name());
    let mut notes = gates_in_the_way(&options, &survey);
    if !run.is_gateway() {
        return notes;
    }
    notes.extend(HostPlan::new(&options, &survey).map_or_else(|_| Vec::new(), |it| it.notes));
    if let NftState::Missing(why) = &survey.nft {
        notes.push(format!("the firewall could not be looked at ({why}), so a chain that drops what is forwarded would not be seen; root may look"));
    }
    notes
}

/// A profile and where its state lives.
pub(super) struct Run<'a> {
    pub(super) profile: &'a Profile,
    pub(super) state: &'a Path,
}

/// The device before anything on the host was changed for it.
struct Device {
    plan: HostPlan,
    queues: Vec<TunQueue>,
    /// Whether it takes IPv6.
    ipv6: bool,
}

impl Run<'_> {
    async fn go(self) -> anyhow::Result<()> {
        let started = Instant::now();
        // From here on a signal finds the host either untouched or put back, never half changed.
        let mut signals = Signals::new()?;
        if self.profile.tun.enable && self.profile.tun.auto_route {
            ask_ahead();
        }
        let mut journal = Journal::open(self.state)?;
        if let Some((what, advice)) = Journal::open_to_others(self.state) {
            tracing::warn!("{what}. What to do: {advice}");
        }
        // Until all is in force: what another run makes or undoes meanwhile would look like ours.
        let (turn, cut) = beside(self.profile.tun.enable || !journal.is_clean(), signals.end()).await;
        if cut {
            return ended_early(&mut journal);
        }
        if !journal.is_clean() {
            tell_replayed(&journal.replay_closed()?);
        }
        // What can fail without a trace on the host comes first.
        let control = Control::bind(self.state)?;
        // Our own ports are none of those that somebody served before us.
        let survey = self.profile.tun.enable.then(Survey::begin).transpose()?;
        let listeners = self.listeners()?;
        let device = survey.map(|survey| self.device(survey, &journal)).transpose()?;
        if device.is_none() && listeners.is_empty() && self.profile.dns.listen.is_none() {
            bail!("the profile opens nothing: set tun.enable, a port such as mixed-port, or dns.listen");
        }
        let mark = self.mark(device.as_ref().map(|device| &device.plan));
        let own = device.as_ref().map(|device| OwnSockets::new(&device.plan.tun, mark));
        let dialer = Dialer { mark, own, ..Dialer::default() };
        // An IPv6 address that nothing leads to us must not be given to anybody.
        let ipv6 = device.as_ref().is_none_or(|device| device.ipv6);
        let core = tokio::select! {
            core = build::core(self.profile, Outside::Shared, dialer, Some(self.log()), ipv6) => core?,
            () = signals.end() => return ended_early(&mut journal),
        };
        self.serve_names(&core)?;
        let (ended, mut failed) = mpsc::unbounded_channel();
        let (workers, plan) = self.workers(device, &core, &ended)?;
        let workers = Rc::new(workers);
        let in_force = Board::default();
        // Whoever keeps the journal holds the state directory.
        let (trouble, mut troubled) = mpsc::unbounded_channel();
        let (guard, journal) = match plan {
            Some(plan) => {
                let applied = plan.apply(journal)?;
                let journal = applied.journal();
                (Some(self.guard(applied, &in_force, trouble)?), journal)
            }
            None => {
                if journal.is_closed() {
                    tell_taken_over(&journal.replay()?, false);
                }
                (None, Arc::new(Mutex::new(journal)))
            }
        };
        drop(turn);
        let doors: Vec<_> =
            listeners.into_iter().map(|listener| spawn_local(hand_on(listener, Rc::clone(&workers)))).collect();
        let (stop, mut stopped) = mpsc::channel(1);
        let status = status::status(self.profile, &core, &in_force, started);
        let answers = Answers { status, plan: Box::new(move || plan_in_force(&in_force)) };
        let control = Rc::new(control);
        let (state, dns) = (self.state.to_owned(), Arc::clone(&core.dns));
        let keeper = Keeper::post(Kept { state, journal: Arc::clone(&journal), control: Rc::clone(&control), dns });
        let answering = Rc::clone(&control);
        let answers = spawn_local(async move { answering.serve(answers, stop).await });
        self.tell_ready(started);
        let signs = spawn_local(supervisor::give_signs(Rc::clone(&workers)));
        let result = tokio::select! {
            () = signals.end() => Ok(()),
            Some(()) = stopped.recv() => Ok(()),
            Some(()) = failed.recv() => Err(self.why_failed(&mut troubled).await),
            Some(error) = troubled.recv() => Err(error),
        };
        supervisor::stopping();
        if result.is_ok() {
            tracing::info!(
                "stopping; open flows may finish for {} s, and a second signal cuts that short",
                DRAIN.most.as_secs()
            );
        }
        doors.iter().for_each(JoinHandle::abort);
        let mut applied = guard.map(Guard::dismiss).transpose()?;
        // Whoever asks a second time does not want to wait, for nothing of what follows.
        let (turn, cut) = beside(applied.is_some(), signals.end()).await;
        if let Some(Err(error)) = applied.as_mut().map(Applied::release) {
            tracing::warn!("{error}; trying again when the flows have ended");
        }
        // Whoever has held it until now may do so for ever: a stop waits once.
        let in_vain = turn.is_some_and(|turn| !turn.is_ours());
        let mut asked = async || {
            if !cut {
                signals.end().await;
            }
        };
        worker::drain(&workers, DRAIN, asked()).await;
        signs.abort();
        // The next run makes a socket of that name as soon as the state directory is free.
        keeper.dismiss().await;
        answers.abort();
        let _ = answers.await;
        drop(control);
        // Until it is looked at.
        let (turn, _) = match in_vain {
            true => (Some(Turn::at_once()), false),
            false => beside(applied.is_some(), asked()).await,
        };
        // An end that nobody asked for opens no kill switch.
        let stays = applied.as_mut().filter(|_| result.is_err()).and_then(Applied::leave_closed);
        let mut given_back = applied.as_mut().filter(|_| stays.is_none());
        let reverted = given_back.as_mut().map_or(Ok(()), |applied| applied.revert());
        worker::end(&workers, result.is_err());
        let back = reverted.map_err(anyhow::Error::from).and_then(|()| match given_back {
            Some(applied) => tell_proof(&applied.prove()),
            None => Ok(()),
        });
        drop(turn);
        // The state directory is free when the device is gone, and not before.
        drop((applied, journal));
        outcome(result, stays, back)
    }

    /// Opens the proxy ports, so that a port in use is known before anything is changed.
    pub(super) fn listeners(&self) -> anyhow::Result<Vec<Listener>> {
        let listen = &self.profile.listen;
        let access = Arc::new(Access::from(listen));
        let ports =
            [(Inbound::Http, listen.port), (Inbound::Socks, listen.socks_port), (Inbound::Mixed, listen.mixed_port)];
        let open = ports.into_iter().filter_map(|(inbound, port)| Some((inbound, port?)));
        let bound: anyhow::Result<Vec<Listener>> =
            open.map(|(inbound, port)| Ok(Listener::bind(inbound, port.get(), Arc::clone(&access))?)).collect();
        for address in bound.iter().flatten().flat_map(Listener::addresses).filter(|at| !at.ip().is_unspecified()) {
            if !is_here(address) {
                tracing::warn!("bind-address: no interface has {} yet; it is served once one has", address.ip());
            }
        }
        bound
    }

    /// Opens the TUN and works out what it needs of the host, which is as `survey` says.
    fn device(&self, mut survey: Survey, journal: &Journal) -> anyhow::Result<Device> {
        survey.set_aside(&journal.rules());
        let name = self.device_name();
        let options = self.options(name);
        HostPlan::may_start(&options, &survey)?;
        let queues = open_tun(name, workers_wanted()).map_err(|error| explain_tun(name, &error))?;
        survey.ask_nft();
        let shut = (options.strict_route || options.kill_switch) && matches!(survey.nft, NftState::Present { .. });
        let without_ipv6 = survey.settle_ipv6(name, shut);
        let mut plan = HostPlan::new(&options, &survey)?;
        plan.warnings.extend(without_ipv6);
        for note in &plan.notes {
            if self.is_gateway() {
                tracing::warn!("{note}");
            } else {
                tracing::debug!("{note}");
            }
        }
        Ok(Device { plan, queues, ipv6: survey.ipv6 })
    }

    pub(super) fn device_name(&self) -> &str {
        self.profile.tun.device.as_deref().unwrap_or(DEVICE)
    }

    /// Whether other hosts are meant to come through this one: it forwards for them, or answers their names.
    pub(super) fn is_gateway(&self) -> bool {
        self.profile.tun.auto_forward || self.profile.dns.listen.is_some_and(|at| !at.ip().is_loopback())
    }

    pub(super) fn options(&self, name: &str) -> HostOptions {
        let (tun, addresses) = (&self.profile.tun, Addresses::of(self.profile));
        let selection = tun.selection.clone();
        HostOptions {
            tun: name.to_owned(),
            addresses: addresses.device,
            fake: addresses.fake,
            mtu: u32::from(tun.mtu),
            auto_route: tun.auto_route,
            dns_hijack: tun.dns_hijack.iter().any(|target| target.port == 53),
            dns_servers: addresses.dns,
            lan_dns: Vec::new(),
            route_address: selection.route_address,
            route_exclude: selection.route_exclude_address,
            include_interface: selection.include_interface,
            exclude_interface: selection.exclude_interface,
            include_uid: selection.include_uid,
            exclude_uid: selection.exclude_uid,
            auto_forward: tun.auto_forward,
            strict_route: tun.strict_route,
            kill_switch: tun.kill_switch,
            wishes: Wishes {
                first_priority: Some(tun.rule_index),
                table: Some(tun.table_index),
                mark: self.profile.routing_mark.map(Fwmark),
            },
        }
    }

    /// The mark of our own sockets: the one that our rules let pass, or what the profile wishes where there are none.
    fn mark(&self, plan: Option<&HostPlan>) -> Option<Fwmark> {
        match plan {
            Some(plan) if self.profile.tun.auto_route => Some(plan.own_mark()),
            _ => self.profile.routing_mark.map(Fwmark),
        }
    }

    fn log(&self) -> PathBuf {
        self.state.join(FAKE_IP_LOG)
    }

    /// `dns.listen`.
    fn serve_names(&self, core: &Arc<Core>) -> anyhow::Result<()> {
        let Some(listen) = self.profile.dns.listen.filter(|_| self.profile.dns.enable) else { return Ok(()) };
        let server = dns::Server::bind(&core.dns, listen)
            .with_context(|| format!("dns.listen: cannot listen on {listen}; is another DNS server there?"))?;
        if let Some((what, advice)) = open_resolver(listen) {
            tracing::warn!("{what}. What to do: {advice}");
        }
        if !listen.ip().is_unspecified() && !is_here(listen) {
            tracing::warn!("dns.listen: no interface has {} yet; names are answered there once one has", listen.ip());
        }
        let dns = Arc::clone(&core.dns);
        spawn_local(async move { server.run(dns).await });
        Ok(())
    }

    /// Starts a worker for each queue, or one without a device for the proxy ports alone.
    fn workers(
        &self,
        device: Option<Device>,
        core: &Arc<Core>,
        ended: &mpsc::UnboundedSender<()>,
    ) -> anyhow::Result<(Vec<Worker>, Option<HostPlan>)> {
        let (queues, plan) = match device {
            Some(device) => (device.queues, Some(device.plan)),
            None => (Vec::new(), None),
        };
        let addresses = Addresses::of(self.profile);
        let mut tuns: Vec<_> = addresses.tuns(self.profile, queues).into_iter().map(Some).collect();
        if tuns.is_empty() {
            tuns.push(None);
        }
        let seeds = tuns.into_iter().map(|tun| Seed { tun, core: Arc::clone(core), ended: ended.clone() });
        let workers: anyhow::Result<Vec<_>> =
            seeds.enumerate().map(|(number, seed)| Worker::start(number, seed)).collect();
        Ok((workers?, plan))
    }

    /// Tells what the plan in force does without, and has it kept true from now on.
    fn guard(
        &self,
        applied: Applied,
        board: &Board,
        trouble: mpsc::UnboundedSender<anyhow::Error>,
    ) -> anyhow::Result<Guard> {
        if let Some(report) = applied.taken_over() {
            tell_taken_over(report, applied.plan().has_kill_switch());
        }
        for warning in applied.plan().all_warnings().chain(applied.warnings()) {
            tracing::warn!("{warning}");
        }
        let mark = self.mark(Some(applied.plan()));
        Guard::post(applied, self.options(self.device_name()), self.is_gateway(), mark, board, trouble)
    }

    /// Why a worker has ended: mostly that its device was taken away, which the guard sees too, and can tell.
    async fn why_failed(&self, troubled: &mut mpsc::UnboundedReceiver<anyhow::Error>) -> anyhow::Error {
        let told = tokio::time::timeout(Duration::from_secs(1), troubled.recv()).await.ok().flatten();
        told.unwrap_or_else(|| anyhow!("a worker has ended; is the TUN device gone?"))
    }

    fn tell_ready(&self, started: Instant) {
        let device = match self.profile.tun.enable {
            true => format!(", TUN {}", self.device_name()),
            false => String::new(),
        };
        let rules = self.profile.rules.len();
        let millis = started.elapsed().as_millis();
        // Whoever waits for the line may be gone; that is no reason to stop.
        let _ = writeln!(io::stdout(), "tunproxy ready in {millis} ms: {rules} rules{device}");
        let _ = io::stdout().flush();
        supervisor::ready(&format!("{rules} rules{device}"));
    }
}

/// The end of a run before it has changed anything: somebody has asked for it, and so opens what an earlier one left closed.
fn ended_early(journal: &mut Journal) -> anyhow::Result<()> {
    if !journal.is_clean() {
        tell_replayed(&journal.replay()?);
    }
    tracing::info!("stopped before anything of this host was changed");
    Ok(())
}

/// What a run came to: of one that nobody ended, in one line what has happened and what was done about it. `stays`: what
/// became of its kill switch; without one the host was put `back`.
fn outcome(
    result: anyhow::Result<()>,
    stays: Option<Result<(), HostError>>,
    back: anyhow::Result<()>,
) -> anyhow::Result<()> {
    let Err(why) = result else { return back };
    let done = match (stays, back) {
        (Some(Ok(())), _) => "this host stays closed".to_owned(),
        (Some(Err(error)), _) => format!("its kill switch is open, and cannot be closed again: {error}"),
        (None, Ok(())) => "the host is as it was before".to_owned(),
        (None, Err(error)) => format!("{error:#}"),
    };
    Err(anyhow!("{why:#}. The run has ended and connections were reset; {done}"))
}

/// What was changed on the host, for those who ask.
fn plan_in_force(board: &Board) -> serde_json::Value {
    // Plain data: there is nothing in it that JSON cannot say.
    board.read().and_then(|plan| serde_json::to_value(plan).ok()).unwrap_or_default()
}

/// One line for what an earlier run left; what stays changed is the user's business, the rest is a matter of detail.
fn tell_replayed(report: &Report) {
    let undone = report.restored.len();
    if report.found_open {
        tracing::warn!("an earlier run ended without putting the host back; {FOUND_OPEN}");
    } else if report.stays_closed {
        tracing::warn!("an earlier run ended and left its kill switch closed; it stays closed until we are ready");
    } else {
        tracing::warn!("an earlier run ended without putting the host back; now it is: {undone} changes were left");
    }
    for line in &report.left_alone {
        tracing::warn!("left, because it was changed since: {line}");
    }
    for line in &report.restored {
        tracing::debug!("undone: {line}");
    }
}

/// What became of the kill switch that an earlier run left, now that the plan is in force. `closed`: it has one of its own.
fn tell_taken_over(report: &Report, closed: bool) {
    let undone = report.restored.len();
    if report.found_open {
        tracing::info!("what was left of the earlier run's kill switch is undone: {undone} changes");
    } else if closed {
        tracing::info!("our kill switch is closed, and that of the earlier run undone: {undone} changes");
    } else {
        tracing::info!("this profile has no kill switch, and that of the earlier run is undone: {undone} changes");
    }
}

/// The last line of a run that has changed the host.
fn tell_proof(proof: &Result<Proof, HostError>) -> anyhow::Result<()> {
    match proof {
        Ok(Proof { still, .. }) if !still.is_empty() => {
            bail!("the host was put back, and a second look finds what would still be to do: {}", still.join("; "))
        }
        Ok(Proof { undone, left: 0, .. }) => {
            tracing::info!("the host is as it was: {undone} changes undone, and looked at again");
        }
        Ok(Proof { undone, left, .. }) => tracing::warn!(
            "{undone} changes undone, and looked at again; {left} were left, because somebody has changed them since"
        ),
        Err(error) => tracing::warn!("the host was put back, and could not be looked at again: {error}"),
    }
    Ok(())
}

/// Gives accepted clients to the workers in turn.
async fn hand_on(listener: Listener, workers: Rc<Vec<Worker>>) {
    let next = std::cell::Cell::new(0_usize);
    let hand = |accepted| {
        let worker = &workers[next.get() % workers.len()];
        next.set(next.get().wrapping_add(1));
        worker.serve(accepted);
    };
    if let Err(error) = listener.run(hand).await {
        tracing::error!("a proxy port cannot be served any longer: {error}");
    }
}

/// One for each core, up to what the directory of flows is worth.
pub(super) fn workers_wanted() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get).min(MOST_WORKERS)
}
