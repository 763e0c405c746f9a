//! How fast one client may open ways to new peers while its worker is behind. Each costs a socket and a task, thirty times
//! what a datagram costs that is dropped: without a limit, one client that sprays leaves no time for what the others send.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use foldhash::fast::RandomState;
use tokio::time::Instant;

use crate::net::client_of;

/// One client, at once: a browser that comes back with all its tabs, a game that looks at all its servers.
const AT_ONCE: u32 = 512;
/// One client, from then on.
const EACH_SECOND: u32 = 512;
/// One client that has used up half of the former, in one turn of a worker that is behind: the fewer turns there are, because
/// others have the processor, the fewer ways are opened.
const OF_TURN: u32 = 4;
/// All clients together, of both: so many that four who spray leave something to others.
const OF_ALL: u32 = 4;
/// What may be opened beyond that in one turn of a worker that is not behind: it will know soon whether it is.
const BEYOND: u32 = 16;
/// Clients that are kept in mind; those who have their whole allowance are not needed.
const MOST_CLIENTS: usize = 1024;
/// Those are looked for no more often: among a flood of forged sources each would look for them in vain.
const SWEEP: Duration = Duration::from_millis(20);

/// What each client may still open, on one worker.
pub(super) struct Pace {
    clients: HashMap<IpAddr, Allowance, RandomState>,
    all: Allowance,
    /// The number of this turn, and whether the worker is behind in it.
    turn: u64,
    behind: bool,
    /// What is left of [`BEYOND`] in this turn.
    beyond: u32,
    swept: Instant,
}

/// So many times what one client has.
#[derive(Clone, Copy)]
struct Allowance {
    times: u32,
    left: u32,
    /// Up to when it has been paid out.
    paid: Instant,
    /// The last turn in which something was taken, and how much in it.
    turn: (u64, u32),
}

impl Allowance {
    fn new(times: u32, now: Instant) -> Self {
        Self { times, left: times * AT_ONCE, paid: now, turn: (0, 0) }
    }

    /// Pays out what has come together by `now`.
    fn pay(&mut self, now: Instant) {
        let (most, each) = (self.times * AT_ONCE, Duration::from_secs(1) / (self.times * EACH_SECOND));
        let due = now.saturating_duration_since(self.paid).as_nanos() / each.as_nanos();
        let due = u32::try_from(due).unwrap_or(most).min(most - self.left);
        self.left += due;
        // What is not paid out yet is not lost, unless there is no more to be had.
        self.paid = if self.left == most { now } else { self.paid + each * due };
    }

    /// Takes one, if there is one.
    fn take(&mut self, now: Instant) -> bool {
        self.pay(now);
        let taken = self.left > 0;
        self.left -= u32::from(taken);
        taken
    }

    /// Notes that something was taken in `turn`. Whether that is much, and it was not the first.
    fn is_too_much(&mut self, turn: u64) -> bool {
        let before = if self.turn.0 == turn { self.turn.1 } else { 0 };
        self.turn = (turn, before + 1);
        before >= OF_TURN && self.left < self.times * AT_ONCE / 2
    }

    fn is_whole(&self) -> bool {
        self.left == self.times * AT_ONCE
    }
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        let (clients, all) = (HashMap::default(), Allowance::new(OF_ALL, now));
        Self { clients, all, turn: 0, behind: false, beyond: BEYOND, swept: now }
    }

    /// A new turn of the worker begins, which may be behind with its work.
    pub(super) fn turn(&mut self, behind: bool) {
        (self.turn, self.behind, self.beyond) = (self.turn + 1, behind, BEYOND);
    }

    /// Whether `client` may open one more, which is then taken from what it may. Who asks too often has less for it.
    pub(super) fn admits(&mut self, client: IpAddr, now: Instant) -> bool {
        let (turn, behind) = (self.turn, self.behind);
        let own = self.allowance(client_of(client), now).is_none_or(|allowance| {
            // Both count, whatever the other says.
            allowance.take(now) & !(allowance.is_too_much(turn) & behind)
        });
        if own && self.all.take(now) {
            return true;
        }
        let admitted = !behind && self.beyond > 0;
        self.beyond -= u32::from(admitted);
        admitted
    }

    /// None: there are so many clients that they cannot be told apart.
    fn allowance(&mut self, client: IpAddr, now: Instant) -> Option<&mut Allowance> {
        let is_new = !self.clients.contains_key(&client);
        if is_new && self.clients.len() >= MOST_CLIENTS && now >= self.swept + SWEEP {
            self.swept = now;
            self.clients.values_mut().for_each(|allowance| allowance.pay(now));
            self.clients.retain(|_, allowance| !allowance.is_whole());
        }
        if is_new && self.clients.len() >= MOST_CLIENTS {
            return None;
        }
        Some(self.clients.entry(client).or_insert_with(|| Allowance::new(1, now)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(n: u32) -> IpAddr {
        IpAddr::from((0x0a07_0000 + n).to_be_bytes())
    }

    /// Asks in turns of their own.
    fn admitted(pace: &mut Pace, client: IpAddr, many: u32, now: Instant) -> u32 {
        (0..many).map(|_| u32::from(admits(pace, client, now))).sum()
    }

    fn admits(pace: &mut Pace, client: IpAddr, now: Instant) -> bool {
        pace.turn(pace.behind);
        pace.admits(client, now)
    }

    fn behind(now: Instant) -> Pace {
        let mut pace = Pace::new(now);
        pace.turn(true);
        pace
    }

    #[test]
    fn a_client_that_sprays_is_held_back_and_others_are_not() {
        let now = Instant::now();
        let mut pace = behind(now);
        assert_eq!(admitted(&mut pace, client(1), 100_000, now), AT_ONCE);
        assert_eq!(admitted(&mut pace, client(2), 100, now), 100);
        for second in 1..5 {
            let now = now + Duration::from_secs(second);
            assert_eq!(admitted(&mut pace, client(1), 100_000, now), EACH_SECOND);
        }
    }

    #[test]
    fn one_that_keeps_the_pace_is_never_held_back() {
        let begin = Instant::now();
        let mut pace = behind(begin);
        admitted(&mut pace, client(1), AT_ONCE, begin);
        for n in 1..5_000 {
            let now = begin + Duration::from_secs(n) / EACH_SECOND;
            assert!(admits(&mut pace, client(1), now), "{n}");
        }
    }

    #[test]
    fn a_worker_that_is_not_behind_takes_more_but_not_all_in_one_turn() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        let in_one_turn = |pace: &mut Pace| (0..10_000).map(|_| u32::from(pace.admits(client(1), now))).sum::<u32>();
        assert_eq!(in_one_turn(&mut pace), AT_ONCE + BEYOND);
        pace.turn(false);
        assert_eq!(in_one_turn(&mut pace), BEYOND);
        pace.turn(true);
        assert_eq!(in_one_turn(&mut pace), 0);
    }

    #[test]
    fn of_few_turns_a_client_that_sprays_has_few_openings_and_one_that_does_not_has_all() {
        let begin = Instant::now();
        let mut pace = behind(begin);
        admitted(&mut pace, client(1), 10_000, begin);
        let sprayed: u32 = (1..=20)
            .map(|turn| {
                pace.turn(true);
                let now = begin + turn * Duration::from_millis(50);
                assert_eq!((0..10).filter(|_| pace.admits(client(2), now)).count(), 10, "a burst now and then");
                (0..100).map(|_| u32::from(pace.admits(client(1), now))).sum::<u32>()
            })
            .sum();
        assert_eq!(sprayed, 20 * OF_TURN);
    }

    #[test]
    fn all_the_addresses_of_one_network_of_ipv6_are_one_client() {
        let now = Instant::now();
        let mut pace = behind(now);
        let of = |n: u32| IpAddr::from((0x2001_0db8_u128 << 96 | u128::from(n)).to_be_bytes());
        assert_eq!((0..10_000).map(|n| u32::from(admits(&mut pace, of(n), now))).sum::<u32>(), AT_ONCE);
    }

    #[test]
    fn forged_sources_together_have_a_pace_too_and_what_is_kept_in_mind_is_bounded() {
        let now = Instant::now();
        let mut pace = behind(now);
        let all = |pace: &mut Pace, now| (0..65_000).map(|n| u32::from(admits(pace, client(n), now))).sum::<u32>();
        assert_eq!(all(&mut pace, now), OF_ALL * AT_ONCE);
        assert_eq!(all(&mut pace, now + Duration::from_secs(1)), OF_ALL * EACH_SECOND);
        assert!(pace.clients.len() <= MOST_CLIENTS);
    }
}
