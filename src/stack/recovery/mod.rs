//! What was lost on the way to a client, and when it is sent again: by what the client says of gaps (RFC 2018, RFC 6675),
//! by the times at which things were sent (RACK and tail loss probes, RFC 8985), and by a timeout at last (RFC 6298).
//!
//! smoltcp sends data for the first time; what is lost [`Table`](super::table::Table) sends again, straight from the ring.

mod clock;
mod flight;
mod window;

use std::time::{Duration, Instant};

use self::clock::Clock;
use self::flight::{Fate, Flight, Part};
use self::window::Window;
use super::progress::is_ahead;
use super::tcp::Blocks;

/// So many acknowledgements of the same, or segments beyond a gap, mean that something is lost (RFC 5681).
const DUPLICATES: u8 = 3;
/// No timer is finer than this.
const GRAIN: Duration = Duration::from_millis(1);
/// A client may wait so long before it acknowledges a single segment.
const DELAYED: Duration = Duration::from_millis(50);
/// smoltcp's timer never runs shorter than a second; some time before that its segments are looked at one by one.
const STALLED: Duration = Duration::from_millis(900);
/// The most that is sent again in one piece.
const PIECE: usize = 60_000;

/// What is known of a client before anything is sent to it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    /// Payload of its largest segments, in bytes.
    pub(super) segment: usize,
    /// It tells what has come beyond a gap.
    pub(super) selective: bool,
    /// Its link may lose packets and be crowded.
    pub(super) remote: bool,
    /// Bytes of the ring.
    pub(super) ring: usize,
}

/// What a segment of the client says of our data.
#[derive(Debug, Clone, Copy)]
pub(super) struct Word {
    /// The earliest number that is still to be acknowledged after it.
    pub(super) start: u32,
    pub(super) blocks: Blocks,
    /// It carries nothing else, and the same window as the one before.
    pub(super) bare: bool,
    /// Whether its window is shut; None: it says nothing of the window as it is now.
    pub(super) shut: Option<bool>,
}

/// A time in which something is missing.
#[derive(Debug, Clone, Copy)]
struct Episode {
    /// The end of what had been sent when that was noticed.
    until: u32,
    cut: bool,
}

/// What of the acknowledged data was sent last.
#[derive(Debug, Clone, Copy)]
struct Newest {
    sent: ((Instant, u32), u32),
    round_trip: Duration,
}

/// The state of one flow.
#[derive(Debug)]
pub(super) struct Recovery {
    terms: Terms,
    flight: Flight,
    window: Option<Window>,
    clock: Clock,
    /// The sequence number behind all that the task has written.
    written: u32,
    duplicates: u8,
    episode: Option<Episode>,
    /// Where the last episode ended: what was sent again in it may still bring equal words about (RFC 6582 section 4).
    recovered: Option<u32>,
    /// The client takes nothing now.
    shut: bool,
    newest: Option<Newest>,
    /// The highest number that has arrived.
    highest: u32,
    /// Once in a while something arrives behind what was sent after it. A larger factor means more patience.
    reordered: Option<u32>,
    round: u32,
    /// When the retransmission timer was started.
    started: Instant,
    /// When something was acknowledged, or sent to a client that owed nothing.
    moved: Instant,
    sent: Instant,
    /// The end of what was sent when the tail was probed.
    probed: Option<u32>,
    tail: bool,
    /// One segment goes out whatever the window says.
    urgent: bool,
    look: Option<Instant>,
    /// Where smoltcp has gone back to an earlier number: the end of what it sent last.
    back: Option<u32>,
}

impl Recovery {
    pub(super) fn new(terms: Terms, now: Instant) -> Self {
        Self {
            terms,
            flight: Flight::new(0, (terms.ring / 1024).clamp(16, 1024)),
            window: terms.remote.then(|| Window::new(terms.segment)),
            clock: Clock::default(),
            written: 0,
            duplicates: 0,
            episode: None,
            recovered: None,
            shut: false,
            newest: None,
            highest: 0,
            reordered: None,
            round: 0,
            started: now,
            moved: now,
            sent: now,
            probed: None,
            tail: false,
            urgent: false,
            look: None,
            back: None,
        }
    }

    /// The first byte of data will have this number.
    pub(super) fn begin(&mut self, first: u32) {
        (self.flight.start, self.flight.end) = (first, first);
        (self.written, self.highest, self.round) = (first, first, first);
    }

    pub(super) fn wrote(&mut self, bytes: usize) {
        self.written = self.written.wrapping_add(super::flow::low_bits(bytes));
    }

    /// The sequence number behind all that the task has written.
    pub(super) fn written(&self) -> u32 {
        self.written
    }

    /// Whether some of what was written was never sent.
    pub(super) fn has_unsent(&self) -> bool {
        self.written != self.flight.end && is_ahead(self.written, self.flight.end)
    }

    /// The first number that is not acknowledged and the end of what was sent, where smoltcp may send that again by itself.
    pub(super) fn repeats(&self, now: Instant) -> Option<(u32, u32)> {
        let stalled = now.saturating_duration_since(self.moved) >= STALLED;
        // Its own fast retransmission may need one word less, since it counts ours as well.
        let told = self.duplicates.saturating_add(1) >= DUPLICATES;
        (!self.flight.is_empty() && (stalled || told || self.back.is_some()))
            .then_some((self.flight.start, self.flight.end))
    }

    /// smoltcp has sent something that ends here.
    pub(super) fn sent(&mut self, end: u32, now: Instant) {
        let ahead = is_ahead(end, self.flight.end);
        self.back = (!ahead).then_some(end);
        if !ahead || end == self.flight.end {
            return;
        }
        if self.flight.is_empty() {
            if now.saturating_duration_since(self.sent) > self.clock.timeout()
                && let Some(window) = &mut self.window
            {
                window.idle();
            }
            (self.started, self.moved) = (now, now);
        }
        self.sent = now;
        self.flight.extend(end, now);
    }

    /// A router has no room for segments larger than this.
    pub(super) fn shrink(&mut self, segment: usize) {
        if segment < self.terms.segment {
            self.terms.segment = segment;
            self.flight.lose_everything(false);
            self.urgent = true;
        }
    }

    /// The payload of the largest segments, in bytes.
    pub(super) fn segment(&self) -> usize {
        self.terms.segment
    }

    /// Takes note of what a segment says.
    pub(super) fn hear(&mut self, word: &Word, now: Instant) {
        let (before, flying) = (self.flight.start, self.flight.flying());
        let reopened = self.shut && word.shut == Some(false);
        self.shut = word.shut.unwrap_or(self.shut);
        self.learn_order(word, now);
        if self.flight.is_empty() && word.start == before {
            return;
        }
        let news = self.take(word, now);
        let advanced = word.start != before && is_ahead(word.start, before);
        if advanced {
            (self.started, self.moved, self.duplicates, self.probed) = (now, now, 0, None);
            if news.once {
                self.clock.progress();
            }
            if self.back.is_some_and(|back| is_ahead(word.start, back)) {
                // smoltcp follows.
                self.back = (word.start != self.flight.end).then_some(word.start);
            }
        } else if word.start != before {
            // Refused after all.
            self.flight.put_back(word.start, now);
        } else if word.bare {
            self.duplicates = self.duplicates.saturating_add(1);
        }
        if let Some(window) = &mut self.window {
            window.arrived(news.bytes, news.round_trip, 2 * flying >= window.bytes, now);
            if is_ahead(word.start, self.round) {
                window.round_over(self.clock.least());
                self.round = self.flight.end;
            }
        }
        let start = self.flight.start;
        if let Some(over) = self.episode.take_if(|episode| is_ahead(start, episode.until)) {
            self.recovered = Some(over.until);
            if let Some(window) = &mut self.window {
                window.episode_over();
            }
        }
        self.recovered = self.recovered.filter(|until| *until == start || !is_ahead(start, *until));
        let gone = self.find_lost(now);
        self.lose(gone);
        if !self.terms.selective {
            self.guess(advanced);
        }
        if reopened {
            self.reopen(now);
        }
    }

    /// What a client without SACK misses, after a word that has `advanced` or not (RFC 6582).
    fn guess(&mut self, advanced: bool) {
        let fresh = self.flight.parts.front().is_some_and(|part| !part.again);
        let partial = advanced && self.episode.is_some() && fresh;
        let proof = self.duplicates == DUPLICATES && self.episode.is_none() && self.recovered.is_none();
        if partial || proof {
            let gone = self.flight.lose_first(self.terms.segment);
            self.lose(gone);
            self.urgent |= gone > 0;
        }
    }

    /// A client that had shut its window over what was on its way has thrown that away.
    fn reopen(&mut self, now: Instant) {
        if self.flight.is_empty() {
            return;
        }
        self.flight.lose_everything(false);
        self.clock.progress();
        self.episode = Some(Episode { until: self.flight.end, cut: true });
        (self.newest, self.look, self.probed, self.duplicates) = (None, None, None, 0);
        (self.started, self.urgent) = (now, true);
    }

    /// Takes out what has arrived.
    fn take(&mut self, word: &Word, now: Instant) -> News {
        let (least, highest, sure) = (self.clock.least(), self.highest, self.terms.selective || self.episode.is_none());
        let (mut news, mut newest, mut top) = (News::default(), self.newest, highest);
        let mut overtaken = false;
        let mut of = |part: &Part| {
            if part.fate == Fate::Arrived {
                return;
            }
            news.bytes += part.bytes();
            let round_trip = now.saturating_duration_since(part.sent.0);
            if !part.again {
                news.once = true;
                overtaken |= is_ahead(highest, part.end) && highest != part.end;
                if sure {
                    news.round_trip = news.round_trip.into_iter().chain([round_trip]).min();
                }
            }
            if is_ahead(part.end, top) {
                top = part.end;
            }
            let meant = !part.again || round_trip >= least;
            if meant && newest.is_none_or(|newest| !part.is_before(newest.sent)) {
                newest = Some(Newest { sent: (part.sent, part.end), round_trip });
            }
        };
        self.flight.acknowledge(word.start, &mut of);
        for (left, right) in word.blocks.iter() {
            self.flight.arrive(left, right, &mut of);
        }
        (self.newest, self.highest) = (newest, top);
        if overtaken {
            self.reordered.get_or_insert(1);
        }
        if let Some(round_trip) = news.round_trip {
            self.clock.sample(round_trip);
        }
        news
    }

    /// What arrives twice (RFC 2883) was late and not lost.
    fn learn_order(&mut self, word: &Word, now: Instant) {
        let mut blocks = word.blocks.iter();
        let Some((left, right)) = blocks.next() else { return };
        let inside = |(from, to): (u32, u32)| is_ahead(left, from) && is_ahead(to, right);
        if !is_ahead(left, word.start) || blocks.next().is_some_and(inside) {
            let calm = now.saturating_duration_since(self.sent) < self.clock.timeout();
            if !calm || self.probed.is_some() {
                return;
            }
            if let Some(factor) = &mut self.reordered {
                *factor = (*factor + 1).min(16);
            }
            if let Some(window) = &mut self.window {
                window.returned((right.wrapping_sub(left) as usize).min(PIECE));
            }
        }
    }

    /// How much later than what was sent after it something may come.
    fn slack(&self) -> Duration {
        let quarter = self.clock.least() / 4;
        match self.reordered {
            Some(factor) => (quarter * factor).min(self.clock.smoothed().unwrap_or_default()).max(GRAIN),
            None if self.episode.is_some()
                || self.duplicates >= DUPLICATES
                || self.flight.arrived() >= usize::from(DUPLICATES) * self.terms.segment =>
            {
                Duration::ZERO
            }
            None => quarter.max(GRAIN),
        }
    }

    /// Marks what must have come by now if it were to come. Returns how many bytes that is.
    fn find_lost(&mut self, now: Instant) -> usize {
        self.look = None;
        // Without SACK nobody knows what has arrived beyond a gap.
        let Some(newest) = self.newest.filter(|_| self.terms.selective) else { return 0 };
        let wait = newest.round_trip + self.slack();
        let mut lost = 0;
        for part in self.flight.parts.iter_mut().filter(|part| part.fate == Fate::Flying) {
            if !part.is_before(newest.sent) {
                continue;
            }
            let due = part.sent.0 + wait;
            if due <= now {
                part.fate = Fate::Lost;
                lost += part.bytes();
            } else {
                self.look = self.look.into_iter().chain([due]).min();
            }
        }
        lost
    }

    fn lose(&mut self, bytes: usize) {
        if bytes == 0 {
            return;
        }
        self.urgent |= self.episode.is_none();
        let until = self.flight.end;
        let episode = self.episode.get_or_insert(Episode { until, cut: false });
        let Some(window) = &mut self.window else { return };
        window.lost(bytes);
        if !episode.cut && window.is_crowded() {
            window.cut();
            episode.cut = true;
        }
    }

    /// What time has made of it.
    pub(super) fn tick(&mut self, now: Instant) {
        if self.flight.is_empty() {
            return;
        }
        if self.times_out_at() <= now {
            self.time_out(now);
        } else if self.probes_at().is_some_and(|at| at <= now) {
            (self.probed, self.tail, self.started) = (Some(self.flight.end), true, now);
        } else if self.look.is_some_and(|at| at <= now) {
            let gone = self.find_lost(now);
            self.lose(gone);
        }
    }

    /// When [`Self::tick`] has something to do.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let pending = !self.flight.is_empty();
        pending.then(|| [Some(self.times_out_at()), self.probes_at(), self.look].into_iter().flatten().min())?
    }

    fn times_out_at(&self) -> Instant {
        self.started + self.clock.timeout()
    }

    /// The last segments of a burst leave nothing behind that would tell of their loss. One of them is sent once more.
    fn probes_at(&self) -> Option<Instant> {
        let smoothed = self.clock.smoothed().filter(|_| self.episode.is_none() && self.probed.is_none())?;
        let single = self.flight.bytes() <= self.terms.segment;
        let wait = smoothed * 2 + if single { DELAYED } else { GRAIN * 2 };
        Some(self.started.max(self.sent) + wait)
    }

    fn time_out(&mut self, now: Instant) {
        self.clock.timed_out();
        // Twice in a row: perhaps the client has thrown away what it had.
        let first = self.flight.parts.front().map(|part| part.fate);
        let missing = self.flight.bytes() - self.flight.arrived();
        let timeouts = self.clock.timeouts();
        self.flight.lose_everything(timeouts > 1 || first == Some(Fate::Arrived));
        // That a client takes nothing says nothing of the path.
        if let Some(window) = self.window.as_mut().filter(|_| !self.shut) {
            window.timed_out((timeouts == 1).then_some(missing));
        }
        self.episode = Some(Episode { until: self.flight.end, cut: true });
        (self.newest, self.look, self.probed, self.duplicates) = (None, None, None, 0);
        (self.started, self.urgent) = (now, true);
    }

    /// Where what is to be sent again begins and ends, not longer than `most` bytes.
    pub(super) fn next(&mut self, most: usize) -> Option<(u32, u32)> {
        let segment = self.terms.segment;
        if std::mem::take(&mut self.tail) && self.flight.lost().is_none() {
            let bytes = super::flow::low_bits(segment.min(most).min(self.flight.bytes()));
            return (bytes > 0).then(|| (self.flight.end.wrapping_sub(bytes), self.flight.end));
        }
        let (start, end) = self.flight.lost()?;
        let room = if self.shut { 0 } else { self.room() };
        let room = if room < segment && std::mem::take(&mut self.urgent) { segment } else { room / segment * segment };
        let bytes = room.min(most).min(PIECE.max(segment)).min(end.wrapping_sub(start) as usize);
        (bytes > 0).then(|| (start, start.wrapping_add(super::flow::low_bits(bytes))))
    }

    pub(super) fn sent_again(&mut self, start: u32, end: u32, now: Instant) {
        if start == self.flight.start {
            self.started = now;
        }
        self.urgent = false;
        self.flight.resend(start, end, now);
    }

    /// How much more may fly.
    fn room(&self) -> usize {
        // A repair is a packet, however little it carries.
        let flying = self.flight.burden(self.terms.segment);
        match &self.window {
            None => PIECE.max(self.terms.segment),
            Some(window) if flying == 0 => window.bytes.max(self.terms.segment),
            Some(window) => window.bytes.saturating_sub(flying),
        }
    }

    /// How far behind the earliest number that is not acknowledged new data may reach, in bytes. None: as far as the
    /// client's own window.
    pub(super) fn reach(&self) -> Option<usize> {
        self.window.as_ref()?;
        let lost = self.flight.lost().is_some();
        let room = if lost { 0 } else { self.room() / self.terms.segment * self.terms.segment };
        Some(self.flight.bytes() + room)
    }
}

/// What has arrived.
#[derive(Default)]
struct News {
    bytes: usize,
    /// Some of it was sent only once, so that the word answers that (Karn).
    once: bool,
    /// Of that of it which was sent last and once.
    round_trip: Option<Duration>,
}

#[cfg(test)]
mod tests;
