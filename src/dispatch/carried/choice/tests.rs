use std::net::Ipv4Addr;

use super::*;

fn client(number: u8) -> IpAddr {
    Ipv4Addr::new(192, 0, 2, number).into()
}

/// `many` flows or dials of a client, each so many milliseconds old; their numbers follow those that are there.
fn add(all: &mut Vec<(Candidate, u64)>, many: usize, number: u8, dial: bool, age: u64) -> std::ops::Range<u64> {
    let (first, now) = (all.len() as u64, Instant::now());
    all.extend(
        (0..many as u64).map(|n| (Candidate { number: first + n, client: client(number), dial, since: now }, age)),
    );
    first..first + many as u64
}

/// What is chosen for `asker`.
fn chosen(all: &[(Candidate, u64)], asker: u8) -> Choice {
    // The oldest is as old as that; the clock of a test cannot be put back.
    let now = Instant::now() + Duration::from_secs(1000);
    let aged =
        |(candidate, age): &(Candidate, u64)| Candidate { since: now - Duration::from_millis(*age), ..*candidate };
    choose(all.iter().map(aged), client(asker), now)
}

fn these(choice: Choice) -> Vec<u64> {
    match choice {
        Choice::These(mut chosen) => {
            chosen.sort_unstable();
            chosen
        }
        other => panic!("{other:?}"),
    }
}

fn waits(choice: &Choice) -> bool {
    matches!(choice, Choice::NotBefore(_))
}

/// In one millisecond less it may not go yet.
const JUST_NOW: u64 = 499;

#[test]
fn dials_of_one_client_into_nothing_give_way_to_another_before_anything_of_the_others_does() {
    let mut all = Vec::new();
    let greedy = add(&mut all, 190, 1, true, 600);
    add(&mut all, 4, 2, false, 60_000);
    let gone = these(chosen(&all, 3));
    assert_eq!(gone.len(), 190 / 16);
    assert!(gone.iter().all(|number| greedy.contains(number)), "to a newcomer: {gone:?}");
    assert!(these(chosen(&all, 2)).iter().all(|number| greedy.contains(number)), "to one who has flows");
    assert!(waits(&chosen(&all, 1)), "to its own next dials they give way when they are slow, and nobody else does");
    all.iter_mut().for_each(|(candidate, age)| *age = if candidate.dial { JUST_NOW } else { *age });
    assert!(waits(&chosen(&all, 3)), "each has some time to be answered");
}

#[test]
fn dials_from_ever_new_addresses_are_those_of_one_client() {
    let mut all = Vec::new();
    let idle = add(&mut all, 60, 1, false, 60_000);
    let forged = all.len() as u64;
    for number in 100..220 {
        add(&mut all, 1, number, true, if number < 120 { 900 } else { JUST_NOW });
    }
    let oldest = forged..forged + 20;
    for asker in [1, 2, 150] {
        let gone = these(chosen(&all, asker));
        let of_idle = gone.iter().any(|number| idle.contains(number));
        assert_eq!(
            of_idle,
            asker == 1,
            "{asker}: who has idle flows may lose these to itself, and to no forger: {gone:?}"
        );
        assert!(of_idle || gone.iter().all(|number| oldest.contains(number)), "{asker}: {gone:?}");
    }
}

#[test]
fn a_flow_that_moves_stays_while_there_are_idle_ones_and_else_the_stalest_of_who_has_most_goes() {
    let mut all = Vec::new();
    let busy = add(&mut all, 90, 1, false, 4000);
    let idle = add(&mut all, 60, 2, false, 6000);
    assert!(these(chosen(&all, 3)).iter().all(|number| idle.contains(number)), "60 of 50 are more than a part");
    assert!(these(chosen(&all, 2)).iter().all(|number| idle.contains(number)));
    assert!(
        these(chosen(&all, 1)).iter().all(|number| busy.contains(number)),
        "it asks for more than it has a part of"
    );
    all.retain(|(candidate, _)| candidate.number < 90);
    add(&mut all, 60, 2, false, 4000);
    all[5].1 = 4900;
    assert_eq!(these(chosen(&all, 3)).len(), 90 / 16);
    assert!(these(chosen(&all, 3)).contains(&5), "of these the stalest");
    all.iter_mut().for_each(|(_, age)| *age = JUST_NOW);
    assert!(waits(&chosen(&all, 3)), "where data moves all the time nobody goes");
}

#[test]
fn who_has_less_than_half_of_a_part_loses_nothing_to_others() {
    let mut all = Vec::new();
    add(&mut all, 100, 1, false, 10);
    add(&mut all, 5, 2, false, 600_000);
    assert!(waits(&chosen(&all, 3)));
    assert_eq!(these(chosen(&all, 2)).len(), 1, "to itself it does");
}

#[test]
fn the_only_client_goes_on_with_its_own_stalest_flows() {
    let mut all = Vec::new();
    add(&mut all, 32, 1, false, 500);
    add(&mut all, 64, 1, false, 100);
    let gone = these(chosen(&all, 1));
    assert_eq!(gone.len(), 2);
    assert!(gone.iter().all(|number| *number < 32), "{gone:?}");
    assert_eq!(chosen(&[], 1), Choice::Nobody);
}
