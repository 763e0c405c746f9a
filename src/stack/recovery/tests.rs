use proptest::prelude::*;

use super::*;

const SEGMENT: usize = 1000;
const FIRST: u32 = u32::MAX - 20_000;
const TRIP: Duration = Duration::from_millis(10);

/// A sender that has measured a round trip of [`TRIP`], and nothing of whose is on its way.
fn recovery(remote: bool, selective: bool) -> (Recovery, Instant, u32) {
    let now = Instant::now();
    let mut recovery = Recovery::new(Terms { segment: SEGMENT, selective, remote, ring: 1 << 20 }, now);
    recovery.begin(FIRST);
    recovery.wrote(1 << 20);
    let start = FIRST.wrapping_add(1000);
    recovery.sent(start, now);
    recovery.hear(&word(start, &[], false), now + TRIP);
    (recovery, now + TRIP, start)
}

fn word(start: u32, blocks: &[(u32, u32)], bare: bool) -> Word {
    let mut all = [(0, 0); 4];
    all[..blocks.len()].copy_from_slice(blocks);
    // What is empty says nothing.
    Word { start, blocks: Blocks::from(all), bare, shut: None }
}

/// All that is sent again now, in segments.
fn repairs(recovery: &mut Recovery, now: Instant) -> Vec<(u32, u32)> {
    recovery.tick(now);
    let mut all = Vec::new();
    while let Some((start, end)) = recovery.next(SEGMENT) {
        recovery.sent_again(start, end, now);
        all.push((start, end));
    }
    all
}

#[test]
fn every_gap_is_repaired_in_the_round_trip_in_which_the_client_tells_of_it_and_once() {
    let (mut recovery, now, start) = recovery(true, true);
    let at = |segment: u32| start.wrapping_add(1000 * segment);
    recovery.sent(at(9), now);
    let later = now + TRIP;
    recovery.hear(&word(start, &[(at(1), at(2))], true), later);
    assert_eq!(repairs(&mut recovery, later), [], "one segment may have overtaken another");
    let told = word(start, &[(at(6), at(9)), (at(1), at(2)), (at(3), at(5))], true);
    recovery.hear(&told, later);
    assert_eq!(repairs(&mut recovery, later), [(start, at(1)), (at(2), at(3)), (at(5), at(6))]);
    recovery.hear(&told, later);
    assert_eq!(repairs(&mut recovery, later), []);
    recovery.hear(&word(at(9), &[], true), later + TRIP);
    assert_eq!((repairs(&mut recovery, later + TRIP), recovery.deadline()), (vec![], None));
}

#[test]
fn a_repair_that_is_lost_is_repeated_as_soon_as_something_sent_after_it_has_arrived() {
    let (mut recovery, now, start) = recovery(true, true);
    let at = |segment: u32| start.wrapping_add(1000 * segment);
    recovery.sent(at(5), now);
    recovery.hear(&word(start, &[(at(1), at(5))], true), now + TRIP);
    assert_eq!(repairs(&mut recovery, now + TRIP), [(start, at(1))]);
    recovery.sent(at(6), now + TRIP);
    recovery.hear(&word(start, &[(at(1), at(6))], true), now + TRIP * 2);
    assert_eq!(repairs(&mut recovery, now + TRIP * 2), [(start, at(1))]);
}

#[test]
fn a_tail_that_nothing_follows_is_probed_after_two_round_trips_and_times_out_later_and_later() {
    let (mut recovery, now, start) = recovery(true, true);
    let (middle, end) = (start.wrapping_add(1000), start.wrapping_add(2000));
    recovery.sent(end, now);
    let probe = recovery.deadline().unwrap();
    assert!((TRIP * 2..TRIP * 3).contains(&(probe - now)), "{:?}", probe - now);
    assert_eq!(repairs(&mut recovery, probe), [(middle, end)]);
    let mut waits = Vec::new();
    let mut last = probe;
    for _ in 0..12 {
        let due = recovery.deadline().unwrap();
        waits.push(due - last);
        assert_eq!(repairs(&mut recovery, due)[0], (start, middle));
        last = due;
    }
    assert!((Duration::from_millis(200)..Duration::from_millis(250)).contains(&waits[0]), "{waits:?}");
    assert_eq!(waits[2], waits[1] * 2);
    assert_eq!(waits[11], Duration::from_secs(60));
}

#[test]
fn a_client_that_threw_away_what_it_had_gets_it_again() {
    let (mut recovery, now, start) = recovery(true, true);
    let end = start.wrapping_add(4000);
    recovery.sent(end, now);
    recovery.hear(&word(start, &[(start.wrapping_add(1000), end)], true), now + TRIP);
    assert_eq!(repairs(&mut recovery, now + TRIP).len(), 1);
    let mut again = Vec::new();
    for _ in 0..3 {
        let due = recovery.deadline().unwrap();
        again.extend(repairs(&mut recovery, due));
        // A segment at a time after a timeout.
        let got = recovery.flight.start.wrapping_add(1000);
        recovery.hear(&word(got, &[], true), due + TRIP);
        again.extend(repairs(&mut recovery, due + TRIP));
    }
    assert!(again.iter().any(|(_, to)| *to == end), "{again:?}");
}

#[test]
fn a_client_without_sack_is_repaired_after_three_equal_words_and_then_a_gap_for_each_word() {
    let (mut recovery, now, start) = recovery(true, false);
    let at = |segment: u32| start.wrapping_add(1000 * segment);
    recovery.sent(at(8), now);
    let later = now + TRIP;
    for _ in 0..2 {
        recovery.hear(&word(start, &[], true), later);
        assert_eq!(repairs(&mut recovery, later), []);
    }
    recovery.hear(&word(start, &[], true), later);
    assert_eq!(repairs(&mut recovery, later), [(start, at(1))]);
    recovery.hear(&word(at(4), &[], true), later + TRIP);
    assert_eq!(repairs(&mut recovery, later + TRIP)[0], (at(4), at(5)));
}

#[test]
fn what_is_late_is_waited_for_once_the_link_is_known_to_reorder() {
    let (mut recovery, now, start) = recovery(true, true);
    let at = |segment: u32| start.wrapping_add(1000 * segment);
    recovery.sent(at(5), now);
    recovery.hear(&word(start, &[(at(1), at(2))], true), now + TRIP);
    recovery.hear(&word(at(2), &[], true), now + TRIP);
    recovery.hear(&word(at(2), &[(at(3), at(5))], true), now + TRIP);
    recovery.sent(at(9), now + TRIP);
    recovery.hear(&word(at(5), &[(at(6), at(9))], true), now + TRIP * 2);
    assert_eq!(repairs(&mut recovery, now + TRIP * 2), [], "three segments overtook it, as some have before");
    let due = recovery.deadline().unwrap();
    assert!(due - now <= TRIP * 3);
    assert_eq!(repairs(&mut recovery, due), [(at(5), at(6))]);
}

/// Sends what the window allows for so many round trips, of which `loses` says what is lost. Returns the window.
fn travel(rounds: u32, trip: impl Fn(u32) -> Duration, loses: impl Fn(u32) -> bool) -> usize {
    let (mut recovery, mut now, mut start) = recovery(true, true);
    let mut number = 0;
    for round in 0..rounds {
        let count = super::super::flow::low_bits(recovery.reach().unwrap() / SEGMENT);
        let end = start.wrapping_add(1000 * count);
        recovery.sent(end, now);
        now += trip(round);
        let mut fates = (0..count).map(|_| {
            number += 1;
            loses(number)
        });
        let lost: Vec<bool> = fates.by_ref().collect();
        // The last always arrives.
        for at in (0..count).filter(|at| !lost[*at as usize] || at + 1 == count) {
            let left = start.wrapping_add(1000 * at);
            recovery.hear(&word(recovery.flight.start, &[(left, left.wrapping_add(1000))], true), now);
        }
        repairs(&mut recovery, now);
        now += TRIP;
        recovery.hear(&word(end, &[], true), now);
        start = end;
    }
    recovery.window.unwrap().bytes
}

#[test]
fn what_a_radio_loses_does_not_shut_the_window_and_what_a_queue_loses_does() {
    let even = |_| TRIP;
    let clear = travel(30, even, |_| false);
    assert_eq!(clear, 1 << 20, "nothing stops it short of the ring");
    assert!(travel(30, even, |number| number % 50 == 0) > clear / 2, "two in a hundred");
    assert!(travel(30, even, |number| number % 4 == 0) < clear / 10, "a quarter");
    let queued = |round| if round < 5 { TRIP } else { TRIP * 2 };
    assert!(travel(30, queued, |number| number % 50 == 0) < clear / 4, "two in a hundred, while a queue stands");
}

#[test]
fn the_window_is_cut_once_for_all_that_is_lost_of_it() {
    let (mut recovery, now, start) = recovery(true, true);
    let at = |segment: u32| start.wrapping_add(1000 * segment);
    let before = recovery.window.as_ref().unwrap().bytes;
    recovery.sent(at(10), now);
    for (n, left) in [5, 7, 9].into_iter().enumerate() {
        recovery.hear(&word(start, &[(at(left), at(left + 1))], true), now + TRIP * (n as u32 + 1));
    }
    recovery.hear(&word(at(1), &[(at(9), at(10)), (at(5), at(8))], true), now + TRIP * 4);
    let after = recovery.window.as_ref().unwrap().bytes;
    assert!(after > before / 2 && after < before, "{before} {after}");
}

#[test]
fn where_nothing_else_travels_the_fin_is_sent_again() {
    let (mut recovery, now, start) = recovery(false, true);
    let fin = start.wrapping_add(1);
    recovery.sent(fin, now);
    let due = recovery.deadline().unwrap();
    assert_eq!(repairs(&mut recovery, due), [(start, fin)]);
    recovery.hear(&word(fin, &[], true), due + TRIP);
    assert_eq!(recovery.deadline(), None);
}

#[test]
fn a_window_that_opens_again_starts_everything_anew_and_a_shut_one_tells_nothing_of_the_path() {
    let (mut recovery, now, start) = recovery(true, true);
    let at = |segment: u32| start.wrapping_add(1000 * segment);
    recovery.sent(at(4), now);
    recovery.hear(&Word { shut: Some(true), ..word(start, &[], false) }, now + TRIP);
    let before = recovery.window.as_ref().unwrap().bytes;
    let mut last = now;
    for _ in 0..6 {
        last = recovery.deadline().unwrap();
        assert!(repairs(&mut recovery, last).len() <= 1, "one at a time asks whether it is still shut");
    }
    assert_eq!(recovery.window.as_ref().unwrap().bytes, before);
    let opened = last + TRIP;
    recovery.hear(&Word { shut: Some(false), ..word(start, &[], false) }, opened);
    assert_eq!(repairs(&mut recovery, opened), [(start, at(1)), (at(1), at(2)), (at(2), at(3)), (at(3), at(4))]);
    assert!(recovery.deadline().unwrap() - opened < Duration::from_millis(300), "as if nothing had been waited for");
}

#[test]
fn gaps_of_a_byte_bring_about_no_more_packets_than_whole_segments() {
    let (mut recovery, now, start) = recovery(true, true);
    recovery.sent(start.wrapping_add(10_000), now);
    for at in 0..200 {
        let left = start.wrapping_add(20 * at + 1);
        recovery.hear(&word(start, &[(left, left.wrapping_add(1))], true), now + TRIP);
    }
    recovery.hear(&word(start, &[(start.wrapping_add(6000), start.wrapping_add(10_000))], true), now + TRIP);
    let window = recovery.window.as_ref().unwrap().bytes;
    let count = repairs(&mut recovery, now + TRIP).len();
    assert!(count > 1 && count <= window / SEGMENT + 1, "{count} packets in a window of {window}");
}

#[test]
fn without_sack_a_repair_that_arrives_says_nothing_of_what_was_sent_before_it() {
    let (mut recovery, now, start) = recovery(true, false);
    let at = |segment: u32| start.wrapping_add(1000 * segment);
    recovery.sent(at(8), now);
    let mut later = now + TRIP;
    for _ in 0..3 {
        recovery.hear(&word(start, &[], true), later);
    }
    assert_eq!(repairs(&mut recovery, later), [(start, at(1))]);
    later += TRIP;
    recovery.hear(&word(at(4), &[], false), later);
    assert_eq!(repairs(&mut recovery, later), [(at(4), at(5))], "one gap for each word");
    later += TRIP;
    recovery.hear(&word(at(8), &[], false), later);
    // Words that late copies brought about.
    recovery.sent(at(12), later);
    for _ in 0..3 {
        recovery.hear(&word(at(8), &[], true), later);
    }
    assert_eq!(repairs(&mut recovery, later), []);
    recovery.hear(&word(at(9), &[], false), later);
    for _ in 0..3 {
        recovery.hear(&word(at(9), &[], true), later);
    }
    assert_eq!(repairs(&mut recovery, later), [(at(9), at(10))], "now they tell of a new gap");
}

#[test]
fn only_the_first_of_several_timeouts_moves_the_threshold_and_by_all_that_is_missing() {
    let (mut recovery, now, start) = recovery(true, true);
    recovery.sent(start.wrapping_add(10_000), now);
    // The first is lost, and its repair: what flies is less than what is missing.
    recovery.hear(&word(start, &[(start.wrapping_add(8000), start.wrapping_add(10_000))], true), now + TRIP);
    for _ in 0..4 {
        let due = recovery.deadline().unwrap();
        repairs(&mut recovery, due);
    }
    assert!(recovery.clock.timeouts() > 1);
    assert_eq!(recovery.window.as_ref().unwrap().threshold, 4000, "half of eight segments");
}

#[test]
fn a_timeout_stays_long_until_something_is_acknowledged_that_was_sent_once() {
    let (mut recovery, now, start) = recovery(true, true);
    let at = |segment: u32| start.wrapping_add(1000 * segment);
    recovery.sent(at(2), now);
    let mut due = now;
    for _ in 0..5 {
        due = recovery.deadline().unwrap();
        repairs(&mut recovery, due);
    }
    let timeouts = recovery.clock.timeouts();
    recovery.hear(&word(at(2), &[], false), due + TRIP);
    assert!(timeouts > 1 && recovery.clock.timeouts() == timeouts, "of which copy is that the answer?");
    recovery.sent(at(3), due + TRIP);
    recovery.hear(&word(at(3), &[], false), due + TRIP * 2);
    assert_eq!(recovery.clock.timeouts(), 0);
}

#[derive(Debug, Clone)]
enum Step {
    Send(u32),
    Hear(i32, [(i32, i32); 4], bool),
    Wait(u64),
    Refused(u32),
}

fn step() -> impl Strategy<Value = Step> {
    let number = -2000i32..40_000;
    prop_oneof![
        (1u32..3000).prop_map(Step::Send),
        (0i32..3000, prop::array::uniform4((number.clone(), number)), any::<bool>())
            .prop_map(|(start, blocks, bare)| Step::Hear(start, blocks, bare)),
        (0u64..500).prop_map(Step::Wait),
        (1u32..500).prop_map(Step::Refused),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn whatever_a_client_says_the_story_has_no_gap_and_a_bound_and_everything_is_sent_until_it_arrives(
        steps in prop::collection::vec(step(), 0..60),
        remote in any::<bool>(),
        selective in any::<bool>(),
    ) {
        let (mut recovery, mut now, _) = recovery(remote, selective);
        for step in steps {
            let (start, end) = (recovery.flight.start, recovery.flight.end);
            match step {
                Step::Send(bytes) => recovery.sent(end.wrapping_add(bytes), now),
                Step::Hear(by, blocks, bare) => {
                    let by = (by as u32).min(end.wrapping_sub(start));
                    let at = |offset: i32| start.wrapping_add_signed(offset);
                    recovery.hear(&word(start.wrapping_add(by), &blocks.map(|(a, b)| (at(a), at(b))), bare), now);
                }
                Step::Wait(time) => now += Duration::from_millis(time),
                Step::Refused(bytes) => recovery.hear(&word(start.wrapping_sub(bytes), &[], false), now),
            }
            for (from, to) in repairs(&mut recovery, now) {
                prop_assert!(is_ahead(from, recovery.flight.start) && is_ahead(recovery.flight.end, to) && from != to);
            }
            let flight = &recovery.flight;
            let mut at = flight.start;
            for part in &flight.parts {
                prop_assert_eq!(part.start, at);
                prop_assert!(part.bytes() > 0);
                at = part.end;
            }
            prop_assert_eq!(at, flight.end);
            prop_assert!(flight.parts.len() <= 1024);
        }
        let end = recovery.flight.end;
        for _ in 0..500 {
            let Some(due) = recovery.deadline() else { break };
            now = now.max(due);
            let mut reached = recovery.flight.start;
            for (from, to) in repairs(&mut recovery, now) {
                reached = if from == reached { to } else { reached };
            }
            recovery.hear(&word(reached, &[], true), now);
        }
        prop_assert_eq!(recovery.flight.start, end);
    }
}

#[test]
fn what_was_late_and_not_lost_gives_the_window_back_that_was_cut_for_it() {
    for late in [true, false] {
        let (mut recovery, now, start) = recovery(true, true);
        let at = |segment: u32| start.wrapping_add(1000 * segment);
        recovery.sent(at(10), now);
        let later = now + TRIP;
        recovery.hear(&word(start, &[(at(5), at(10))], true), later);
        assert_eq!(repairs(&mut recovery, later).len(), 5, "half of it seems lost");
        let window = |recovery: &Recovery| recovery.window.as_ref().unwrap().bytes;
        let cut = window(&recovery);
        recovery.hear(&word(at(10), &[], true), later + TRIP / 2);
        if late {
            for segment in 0..5 {
                let twice = (at(segment), at(segment + 1));
                recovery.hear(&word(at(10), &[twice], true), later + TRIP);
            }
        }
        assert_eq!(10 * window(&recovery) >= 14 * cut, late, "{cut}, then {}", window(&recovery));
    }
}
