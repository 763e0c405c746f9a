//! What is known of a flow's numbers beside its socket: where its data stands, what its client was told, and for how
//! long it owes an answer.

use std::time::{Duration, Instant};

use smoltcp::socket::tcp::State;

use super::port::{Known, Sent};
use super::reception::Reception;
use super::recovery::{Recovery, Terms};

/// A client that has not acknowledged anything for so long is gone (Linux gives up after 13 to 30 minutes).
const DEAF: Duration = Duration::from_secs(600);
/// The same for a flow without a task (Linux: about a minute).
const LINGER: Duration = Duration::from_secs(60);
/// The same for a handshake: the SYN-ACK and four repetitions. Each one that is forged holds a place until then.
const HANDSHAKE: Duration = Duration::from_secs(20);
/// At most one challenge acknowledgement per flow in so long (RFC 5961 section 7).
const CHALLENGE: Duration = Duration::from_secs(1);

pub(super) struct Progress {
    /// The client's initial sequence number.
    pub(super) initial: u32,
    /// Bytes read out of the receive ring, modulo 2^32.
    pub(super) consumed: u32,
    /// The highest end of data that a segment of the client reached.
    pub(super) highest: u32,
    /// The end of what was sent, FIN included, and the last acknowledgement.
    pub(super) sent: (u32, u32),
    /// The last window that was announced, as it stood there.
    pub(super) announced: u16,
    /// The client's last window, as it stood there, and what smoltcp has for it; None: nobody knows.
    pub(super) window: (u16, Option<u16>),
    /// The right edge of that window, in sequence numbers; None: none was announced since the handshake.
    pub(super) limit: Option<u32>,
    /// The shift of the client's windows.
    pub(super) scale: u8,
    /// The highest acknowledgement of the client.
    pub(super) acknowledged: u32,
    /// Something was sent after the SYN-ACK.
    pub(super) past_syn: bool,
    /// The client's FIN was taken, behind all its data.
    pub(super) finished: bool,
    /// The client was silent for so long that it was asked whether it is still there.
    pub(super) probing: bool,
    /// When the client's last segment came.
    pub(super) heard: Instant,
    /// What was lost on its way to the client.
    pub(super) recovery: Recovery,
    /// What of the client's data has come beyond a gap or twice.
    pub(super) reception: Reception,
    /// The client may be told of that.
    pub(super) selective: bool,
    /// The end of the window that smoltcp has announced, or less.
    pub(super) edge: u32,
    /// The shift of our windows.
    shift: u32,
    /// When data last moved.
    pub(super) moved: Instant,
    /// When this flow's entry in the queue of warm flows is due; None if it has none.
    pub(super) warm: Option<Instant>,
    /// Since when the client owes an acknowledgement, and how many bytes at the last look.
    owes: Option<(Instant, usize)>,
    challenged: Option<Instant>,
}

impl Progress {
    pub(super) fn new(initial: u32, scale: Option<u8>, terms: Terms, now: Instant) -> Self {
        // As smoltcp reckons it: the ring's length is to fit into 16 bits.
        let shift = if scale.is_some() { (terms.ring.checked_ilog2().unwrap_or(0) + 1).saturating_sub(16) } else { 0 };
        Self {
            initial,
            consumed: 0,
            highest: initial.wrapping_add(1),
            sent: (0, 0),
            announced: 0,
            window: (0, None),
            limit: None,
            scale: scale.unwrap_or(0),
            acknowledged: 0,
            past_syn: false,
            finished: false,
            probing: false,
            heard: now,
            recovery: Recovery::new(terms, now),
            reception: Reception::default(),
            selective: terms.selective,
            edge: initial,
            shift,
            moved: now,
            warm: None,
            owes: None,
            challenged: None,
        }
    }

    /// The sequence number behind what the receive ring has in order, `queued` bytes of which wait to be read.
    pub(super) fn next(&self, queued: usize) -> u32 {
        let read = self.initial.wrapping_add(1).wrapping_add(self.consumed);
        read.wrapping_add(super::flow::low_bits(queued))
    }

    /// The sequence number behind everything that was sent; None before the SYN-ACK.
    pub(super) fn end(&self) -> Option<u32> {
        (self.sent != (0, 0)).then_some(self.sent.0)
    }

    /// The sequence number of bare acknowledgements: behind everything that was sent, but not beyond the client's window.
    /// There a probe of a shut one reaches, and an acknowledgement behind it would be dropped unread. What lies before
    /// `start` is acknowledged. None before the SYN-ACK.
    pub(super) fn place(&self, start: u32) -> Option<u32> {
        let end = self.end()?;
        let least = if is_ahead(start, self.acknowledged) { start } else { self.acknowledged };
        let limit = self.limit.map(|limit| if is_ahead(least, limit) { least } else { limit });
        Some(limit.filter(|limit| is_ahead(end, *limit)).unwrap_or(end))
    }

    pub(super) fn note_sent(&mut self, sent: Sent, now: Instant) {
        if !sent.speaks {
            return;
        }
        let first = self.sent == (0, 0);
        if first {
            self.acknowledged = sent.end.wrapping_sub(1);
            self.recovery.begin(sent.end);
        }
        self.past_syn |= !sent.syn;
        // A repeated segment says nothing new about the end.
        if first || is_ahead(sent.end, self.sent.0) {
            self.sent.0 = sent.end;
        }
        self.sent.1 = sent.acknowledgement;
        self.announced = sent.window;
        let edge = sent.acknowledgement.wrapping_add(u32::from(sent.window) << self.shift);
        // smoltcp forgets what it has said in probes, which are of one byte.
        if sent.payload != 1 || is_ahead(self.edge, edge) {
            self.edge = edge;
        }
        // A probe of a shut window counts as not sent until it is taken.
        if !sent.syn && sent.length > 0 && !(self.window.0 == 0 && sent.payload > 0) {
            self.recovery.sent(sent.end, now);
        }
    }

    /// What smoltcp may repeat by itself now, where that may be.
    pub(super) fn known(&self, now: Instant) -> Option<Known> {
        let said = (self.sent.1, self.announced);
        self.recovery.repeats(now).map(|(start, end)| Known { start, end, said })
    }

    /// The client has acknowledged what lies before `acknowledgement`. Returns whether that is news.
    pub(super) fn note_acknowledged(&mut self, acknowledgement: u32) -> bool {
        let sane = self.end().is_some_and(|end| is_ahead(end, acknowledgement));
        let news = sane && acknowledgement != self.acknowledged && is_ahead(acknowledgement, self.acknowledged);
        if news {
            self.acknowledged = acknowledgement;
        }
        news
    }

    /// Whether a segment that began with `sequence` may be on its way to the client (RFC 5927 section 4.1).
    pub(super) fn is_in_flight(&self, sequence: u32) -> bool {
        self.end()
            .is_some_and(|end| is_ahead(sequence, self.acknowledged) && sequence != end && is_ahead(end, sequence))
    }

    /// When the client is to be given up if it stays silent; None while it owes nothing.
    ///
    /// A probe of a shut window that is answered counts as a sign of life, except for an orphan: nobody but we would
    /// keep that, and the client could pin it for ever.
    pub(super) fn patience(&mut self, state: State, unsent: usize, orphan: bool, now: Instant) -> Option<Instant> {
        let control = matches!(state, State::SynReceived | State::FinWait1 | State::Closing | State::LastAck);
        if !control && !self.probing && unsent == 0 {
            self.owes = None;
            return None;
        }
        let (since, _) = *self.owes.get_or_insert((now, unsent));
        let since = match self.owes {
            Some((_, before)) if orphan && unsent < before => now,
            _ => since,
        };
        self.owes = Some((since, unsent));
        let silent = since.max(self.heard);
        Some(match (state, orphan) {
            (State::SynReceived, _) => since + HANDSHAKE,
            (_, true) => (silent + LINGER).min(since + DEAF),
            (_, false) => silent + DEAF,
        })
    }

    /// Whether a challenge acknowledgement may be sent now.
    pub(super) fn may_challenge(&mut self, now: Instant) -> bool {
        let due = self.challenged.is_none_or(|last| now.saturating_duration_since(last) >= CHALLENGE);
        if due {
            self.challenged = Some(now);
        }
        due
    }
}

/// Whether sequence number `a` is `b` or lies ahead of it: the comparison of RFC 1982, modulo 2^32.
pub(super) fn is_ahead(a: u32, b: u32) -> bool {
    a.wrapping_sub(b) < 1 << 31
}
