//! Who gives way when memory is used up: the client that has most, by the flows that it misses least.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::net::IpAddr;
use std::time::Instant;

/// A flow that might be ended.
pub(super) struct Candidate<T> {
    pub(super) client: IpAddr,
    /// What its end gives back.
    pub(super) bytes: usize,
    /// When something last moved in it.
    pub(super) moved: Instant,
    /// So long ago that it may be ended for anybody.
    pub(super) stale: bool,
    /// Its client itself looked for room in vain.
    pub(super) asked: bool,
    pub(super) flow: T,
}

/// Bytes that are to be made free.
pub(super) struct Missing {
    /// At the cost of flows in which nothing moves.
    pub(super) idle: usize,
    /// At the cost of any, for a client that has no more than an equal part.
    pub(super) moving: usize,
    /// For somebody who has no more than an equal part. Others get nothing from who has no more either.
    pub(super) unfair: bool,
}

/// The flows to end. `holdings` says what each client has, `part` what it would have if all had the same.
///
/// Each is one of the client that has most at that time: the largest of those in which nothing moves, the one that has
/// been so for longest if they are equal. If it has none of these, one in which something does, but only as long as
/// [`Missing::moving`] says so and the client has more than its part. A client that has less than half of its part
/// loses nothing.
pub(super) fn choose<T>(
    candidates: Vec<Candidate<T>>,
    holdings: &[(IpAddr, usize)],
    part: usize,
    missing: &Missing,
) -> Vec<T> {
    let mut of: HashMap<IpAddr, Vec<Candidate<T>>, foldhash::fast::RandomState> = HashMap::default();
    for candidate in candidates {
        of.entry(candidate.client).or_default().push(candidate);
    }
    let mut clients: BinaryHeap<(usize, IpAddr)> = holdings.iter().map(|(client, bytes)| (*bytes, *client)).collect();
    let (mut sorted, mut chosen, mut freed) = (std::collections::HashSet::new(), Vec::new(), 0);
    while freed < missing.idle
        && let Some((has, client)) = clients.pop()
        && has >= part / 2
    {
        let Some(flows) = of.get_mut(&client) else { continue };
        if sorted.insert(client) {
            // What goes first stands last.
            flows.sort_unstable_by_key(|flow| (flow.stale, flow.bytes, Reverse(flow.moved)));
        }
        let gives = |flow: &Candidate<T>| missing.unfair || flow.asked || has > part;
        let allowed = |flow: &mut Candidate<T>| flow.stale && gives(flow) || freed < missing.moving && has > part;
        let Some(flow) = flows.pop_if(allowed) else { continue };
        freed += flow.bytes;
        clients.push((has.saturating_sub(flow.bytes), client));
        chosen.push(flow.flow);
    }
    chosen
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn address(client: u8) -> IpAddr {
        Ipv4Addr::new(192, 0, 2, client).into()
    }

    /// The client that looked for room in vain.
    const ASKS: u8 = 1;

    /// A flow by its client, its bytes, and the seconds since something moved in it; stale from five on.
    type Flow = (u8, usize, u64);

    fn chosen(flows: &[Flow], limit: usize, missing: &Missing) -> Vec<usize> {
        let start = Instant::now();
        let candidate = |(flow, (client, bytes, idle)): (usize, &Flow)| Candidate {
            client: address(*client),
            bytes: *bytes,
            moved: start + Duration::from_secs(1000 - idle),
            stale: *idle >= 5,
            asked: *client == ASKS,
            flow,
        };
        let holdings = holdings(flows);
        let part = limit / holdings.len().max(1);
        choose(flows.iter().enumerate().map(candidate).collect(), &holdings, part, missing)
    }

    fn holdings(flows: &[Flow]) -> Vec<(IpAddr, usize)> {
        let mut holdings = std::collections::BTreeMap::new();
        flows.iter().for_each(|(client, bytes, _)| *holdings.entry(address(*client)).or_default() += bytes);
        holdings.into_iter().collect()
    }

    #[test]
    fn of_one_client_the_largest_goes_and_of_equal_ones_the_stalest() {
        let flows = [(1, 10, 9), (1, 30, 6), (1, 10, 99), (1, 90, 4)];
        assert_eq!(chosen(&flows, 140, &Missing { idle: 30, moving: 0, unfair: true }), [1]);
        assert_eq!(chosen(&flows, 140, &Missing { idle: 31, moving: 0, unfair: true }), [1, 2]);
        assert_eq!(chosen(&flows, 140, &Missing { idle: 500, moving: 0, unfair: true }), [1, 2, 0], "what moves stays");
    }

    #[test]
    fn who_has_much_finds_room_among_its_own_flows_and_not_among_those_of_who_has_less() {
        let flows = [(ASKS, 100, 0), (2, 60, 99), (3, 70, 99)];
        assert!(chosen(&flows, 230, &Missing { idle: 100, moving: 0, unfair: false }).is_empty());
        assert_eq!(chosen(&flows, 230, &Missing { idle: 100, moving: 0, unfair: true }), [2, 1]);
        let flows = [(ASKS, 40, 99), (2, 60, 99), (3, 130, 99)];
        assert_eq!(chosen(&flows, 230, &Missing { idle: 200, moving: 0, unfair: false }), [2, 0]);
    }

    #[test]
    fn a_client_with_little_loses_nothing_whatever_it_lets_lie() {
        let flows = [(1, 60, 0), (1, 60, 0), (2, 20, 999)];
        assert!(chosen(&flows, 140, &Missing { idle: 140, moving: 0, unfair: true }).is_empty());
        // Somebody with as little needs room.
        let flow = chosen(&flows, 140, &Missing { idle: 140, moving: 30, unfair: true });
        assert!(flow == [0] || flow == [1], "{flow:?}");
    }

    proptest! {
        #[test]
        fn who_has_most_gives_way_and_never_more_than_is_missing(
            flows in prop::collection::vec((0_u8..6, 1_usize..200, 0_u64..20), 0..80),
            idle in 0_usize..4000,
            moving in 0_usize..1000,
            unfair in any::<bool>(),
        ) {
            let limit: usize = flows.iter().map(|(_, bytes, _)| bytes).sum();
            let missing = Missing { idle, moving: moving.min(idle), unfair };
            let gone = chosen(&flows, limit, &missing);
            let holdings = holdings(&flows);
            let part = limit / holdings.len().max(1);
            let mut has: HashMap<IpAddr, usize> = holdings.into_iter().collect();
            let mut left: Vec<bool> = vec![true; flows.len()];
            let mut freed = 0;
            for flow in gone {
                let (client, bytes, since) = flows[flow];
                let mine = has[&address(client)];
                prop_assert!(std::mem::take(&mut left[flow]), "each flow goes once");
                prop_assert!(freed < missing.idle, "there was enough");
                prop_assert!(mine >= part / 2, "it had little");
                let moves = since < 5;
                prop_assert!(unfair || client == ASKS || mine > part, "it had no more than its part");
                prop_assert!(!moves || freed < missing.moving && mine > part, "no need to end what moves");
                // Whoever has more has nothing left that might go.
                for (at, (other, size, idle)) in flows.iter().enumerate().filter(|(at, _)| left[*at]) {
                    let theirs = has[&address(*other)];
                    let spared = !unfair && *other != ASKS && theirs <= part;
                    prop_assert!(theirs <= mine || *idle < 5 || spared, "{at} was to go before {flow}");
                    prop_assert!(*other != client || *idle < 5 || !moves && *size <= bytes, "{at} was larger");
                }
                freed += bytes;
                *has.get_mut(&address(client)).unwrap() -= bytes;
            }
            // It stopped because nobody had anything left to give.
            if freed < missing.idle {
                for (at, (client, _, idle)) in flows.iter().enumerate().filter(|(at, _)| left[*at]) {
                    let theirs = has[&address(*client)];
                    let spared = !unfair && *client != ASKS && theirs <= part;
                    prop_assert!(*idle < 5 || theirs < part / 2 || spared, "{at} might have gone");
                }
            }
        }
    }
}
