use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

fn pool(range: &str, grace: u32) -> Pool {
    Pool::new(range.parse().unwrap(), grace).unwrap()
}

/// Each name for a client of its own.
fn give(pool: &Pool, name: &str, now: u32) -> Result<IpAddr, Exhausted> {
    let client = IpAddr::from((stable_hash(name.as_bytes()) as u32).to_be_bytes());
    pool.address(name, client, now, |_, _| {})
}

/// To the client 10.0.0.`client`.
fn give_to(client: u8, pool: &Pool, name: &str, now: u32) -> Result<IpAddr, Exhausted> {
    pool.address(name, [10, 0, 0, client].into(), now, |_, _| {})
}

fn name_of(pool: &Pool, ip: IpAddr) -> Option<Name> {
    pool.name_of(ip)
}

/// The slot that a flow of 10.0.0.`client` holds.
fn hold(client: u8, pool: &Pool, ip: IpAddr, now: u32) -> Option<u32> {
    pool.hold(ip, [10, 0, 0, client].into(), now, |_, _| {}).unwrap().1
}

/// A packet of 10.0.0.`client` whose flow is over at once. False: it kept nothing.
fn knock(client: u8, pool: &Pool, ip: IpAddr, now: u32) -> bool {
    hold(client, pool, ip, now).map(|slot| pool.release(slot, now, |_, _| {})).is_some()
}

fn offset(pool: &Pool, ip: IpAddr) -> Option<u32> {
    pool.offset(ip)
}

#[test]
fn the_first_four_addresses_and_the_broadcast_are_not_handed_out() {
    let pool = pool("198.18.0.1/28", 60);
    let mut given: Vec<IpAddr> = (0..11).map(|n| give(&pool, &format!("{n}.example"), 0).unwrap()).collect();
    given.sort();
    let all: Vec<IpAddr> = (4..15).map(|n| IpAddr::from([198, 18, 0, n])).collect();
    assert_eq!(given, all);
    assert_eq!(give(&pool, "one.too.many", 0), Err(Exhausted));
    for host in [0, 1, 2, 3, 15] {
        assert_eq!(offset(&pool, [198, 18, 0, host].into()), None);
    }
}

#[test]
fn a_range_without_a_usable_address_is_refused() {
    for range in ["198.18.0.0/30", "198.18.0.0/32", "fd00::/126", "fd00::/128"] {
        assert!(matches!(Pool::new(range.parse().unwrap(), 60), Err(OpenError::RangeTooSmall(_))), "{range}");
    }
    for range in ["198.18.0.0/29", "0.0.0.0/0", "fd00::/125", "::/0"] {
        let pool = pool(range, 60);
        let ip = give(&pool, "a.example", 0).unwrap();
        assert_eq!(name_of(&pool, ip).unwrap().as_str(), "a.example", "{range}");
    }
}

#[test]
fn a_name_keeps_its_address_whatever_was_asked_before_it() {
    let (one, other) = (pool("198.18.0.0/16", 60), pool("198.18.0.0/16", 60));
    let names: Vec<String> = (0..50).map(|n| format!("host{n}.example")).collect();
    let first: HashMap<_, _> = names.iter().map(|name| (name, give(&one, name, 0).unwrap())).collect();
    for name in names.iter().rev() {
        assert_eq!(give(&other, name, 5).unwrap(), first[name], "{name}");
    }
}

#[test]
fn a_full_pool_reuses_what_was_used_longest_ago_once_its_grace_is_over() {
    let pool = pool("198.18.0.0/29", 60);
    let three = ["a.example", "b.example", "c.example"].map(|name| give(&pool, name, 0).unwrap());
    assert_eq!(give(&pool, "d.example", 59), Err(Exhausted), "all three may still be in use");
    give(&pool, "a.example", 30).unwrap();
    give(&pool, "b.example", 40).unwrap();
    assert_eq!(name_of(&pool, three[2]).unwrap().as_str(), "c.example", "asking for the name of an address is no use");
    assert_eq!(give(&pool, "d.example", 60), Ok(three[2]));
    assert_eq!(name_of(&pool, three[2]).unwrap().as_str(), "d.example");
    assert_eq!(give(&pool, "c.example", 89), Err(Exhausted));
    assert_eq!(give(&pool, "c.example", 90), Ok(three[0]));
}

#[test]
fn an_address_is_never_reused_while_a_flow_holds_it() {
    let pool = pool("198.18.0.0/24", 60);
    let held = give(&pool, "held.example", 0).unwrap();
    let slot = hold(1, &pool, held, 0).unwrap();
    assert_eq!(hold(2, &pool, held, 0), Some(slot), "two flows may hold one address");
    // Twice around, each name far enough in time for every other address to be free again.
    let mut given = HashMap::new();
    for n in 0..2 * 251_u32 {
        let name = format!("{n}.example");
        let now = n * 100;
        let ip = give(&pool, &name, now).unwrap();
        given.insert(ip, name);
        assert_ne!(ip, held);
        assert_eq!(name_of(&pool, held).unwrap().as_str(), "held.example");
    }
    let end = 2 * 251 * 100;
    for (ip, name) in &given {
        assert_eq!(name_of(&pool, *ip).unwrap().as_str(), name, "the last owner, not the first");
    }
    pool.release(slot, end, |_, _| {});
    assert_eq!(name_of(&pool, held).unwrap().as_str(), "held.example");
    pool.release(slot, end, |_, _| {});
    let later = end + 60;
    let mut reused = (0..251).map(|n| give(&pool, &format!("later{n}.example"), later).unwrap());
    assert!(reused.any(|ip| ip == held), "once released it takes its turn");
}

#[test]
fn a_later_record_of_a_name_or_an_address_overrides_an_earlier_one() {
    let pool = pool("198.18.0.0/24", 60);
    let name = |text: &str| Name::new(text).unwrap();
    let ip = |last| IpAddr::from([198, 18, 0, last]);
    assert!(pool.restore(name("a.example"), ip(9), 0));
    assert!(pool.restore(name("b.example"), ip(9), 0));
    assert!(pool.restore(name("b.example"), ip(10), 0));
    assert!(pool.restore(name("b.example"), ip(10), 0));
    assert!(!pool.restore(name("c.example"), ip(2), 0), "reserved");
    assert!(!pool.restore(name("c.example"), [203, 0, 113, 1].into(), 0), "of another range");
    assert_eq!(name_of(&pool, ip(9)), None);
    assert_eq!(name_of(&pool, ip(10)), Some(name("b.example")));
    assert_eq!(pool.len(), 1);
    let mut seen = Vec::new();
    assert!(!pool.visit(0, 100, |name, ip, _| seen.push((name.clone(), ip))));
    assert_eq!(seen, [(name("b.example"), ip(10))]);
}

#[test]
fn one_client_that_takes_what_it_gets_leaves_something_to_every_other() {
    let pool = pool("198.18.0.0/24", 60);
    let flood = |client: u8, now| {
        (0..1000).filter(|n| give_to(client, &pool, &format!("{now}-{client}-{n}"), now).is_ok()).count()
    };
    assert_eq!(flood(1, 0), 220, "of 251, with an eighth left");
    assert!((0..20).all(|n| give_to(2, &pool, &format!("modest{n}.example"), 0).is_ok()));
    assert_eq!(flood(1, 30), 0, "what it has is still in use");
    assert!(give_to(3, &pool, "third.example", 30).is_ok());
    // It goes on, and what was given to the others is not taken from them before its time.
    let modest: Vec<_> = (0..20).map(|n| give_to(2, &pool, &format!("modest{n}.example"), 59).unwrap()).collect();
    assert!(flood(1, 61) > 100);
    for (n, ip) in modest.iter().enumerate() {
        assert_eq!(name_of(&pool, *ip).unwrap().as_str(), format!("modest{n}.example"));
    }
    assert!(give_to(3, &pool, "another.example", 62).is_ok());
}

#[test]
fn a_name_that_two_ask_for_stays_as_long_as_the_later_one_may_use_it() {
    let pool = pool("198.18.0.0/27", 60);
    let ip = give_to(1, &pool, "shared.example", 0).unwrap();
    assert_eq!(give_to(2, &pool, "shared.example", 50), Ok(ip));
    for n in 0..200 {
        let _ = give_to(1, &pool, &format!("{n}.example"), 109);
    }
    assert_eq!(name_of(&pool, ip).unwrap().as_str(), "shared.example");
}

#[test]
fn what_is_in_use_again_counts_again_and_nothing_is_counted_twice() {
    let pool = pool("198.18.0.0/24", 60);
    let names: Vec<_> = (0..200).map(|n| format!("{n}.example")).collect();
    for now in [0, 100, 200] {
        assert!(names.iter().all(|name| give_to(1, &pool, name, now).is_ok()));
        let slots: Vec<_> =
            names.iter().map(|name| hold(1, &pool, give_to(1, &pool, name, now).unwrap(), now).unwrap()).collect();
        slots.into_iter().for_each(|slot| pool.release(slot, now, |_, _| {}));
        assert_eq!((0..100).filter(|n| give_to(1, &pool, &format!("{now}-{n}"), now).is_ok()).count(), 20);
    }
    give_to(2, &pool, "late.example", 1000).unwrap();
    assert_eq!(pool.table.lock().shares.clients(), 1);
}

/// A pool of 251 names from an earlier run, which nobody has used for long, and their addresses.
fn full_and_ripe() -> (Pool, Vec<IpAddr>) {
    let pool = pool("198.18.0.0/24", 60);
    let all: Vec<IpAddr> = (4..255).map(|last| [198, 18, 0, last].into()).collect();
    for (n, ip) in all.iter().enumerate() {
        assert!(pool.restore(Name::new(&format!("{n}.example")).unwrap(), *ip, 0));
    }
    (pool, all)
}

#[test]
fn one_client_that_asks_for_old_names_again_leaves_something_to_every_other() {
    let pool = pool("198.18.0.0/24", 60);
    let names: Vec<_> = (0..220).map(|n| format!("{n}.example")).collect();
    let given: Vec<_> = names.iter().map(|name| give_to(1, &pool, name, 0).unwrap()).collect();
    assert!((0..31).all(|n| give_to(1, &pool, &format!("more{n}.example"), 61).is_ok()));
    for now in [62, 100, 115] {
        let again: Vec<_> = names.iter().map(|name| give_to(1, &pool, name, now).ok()).collect();
        let kept = again.iter().zip(&given).filter(|(again, ip)| **again == Some(**ip)).count();
        assert!((180..=200).contains(&kept), "its part, of which 31 are new names: {kept} at {now}");
        assert!(again.iter().zip(&given).all(|(again, ip)| again.is_none_or(|again| again == *ip)));
    }
    assert!((0..20).all(|n| give_to(2, &pool, &format!("modest{n}.example"), 116).is_ok()));
    assert_eq!(give_to(1, &pool, "new.example", 116), Err(Exhausted));
    let kept = names.iter().zip(&given).filter(|(name, ip)| name_of(&pool, **ip) == Name::new(name).ok()).count();
    assert_eq!(kept, 200, "of what it had beyond its part so much as was needed has gone");
}

#[test]
fn one_client_that_knocks_at_every_address_leaves_something_to_every_other() {
    let (pool, all) = full_and_ripe();
    assert_eq!(all.iter().filter(|ip| knock(1, &pool, **ip, 100)).count(), 220, "of 251, with an eighth left");
    assert!(all.iter().all(|ip| name_of(&pool, *ip).is_some()), "and yet each leads somewhere");
    assert!((0..20).all(|n| give_to(2, &pool, &format!("modest{n}.example"), 101).is_ok()));
    // Flows that go on hold no more than that either.
    let held: Vec<_> = all.iter().filter_map(|ip| hold(1, &pool, *ip, 200)).collect();
    assert!(held.len() <= 220, "{}", held.len());
    assert!((0..20).all(|n| give_to(3, &pool, &format!("other{n}.example"), 300).is_ok()));
}

#[test]
fn what_a_second_client_goes_on_to_use_counts_as_its_own() {
    let pool = pool("198.18.0.0/24", 60);
    let given: Vec<_> = (0..200).map(|n| give_to(1, &pool, &format!("{n}.example"), 0).unwrap()).collect();
    assert!(given.iter().all(|ip| knock(2, &pool, *ip, 50)));
    assert_eq!((0..100).filter(|n| give_to(1, &pool, &format!("more{n}.example"), 61).is_ok()).count(), 45);
    assert_eq!(give_to(2, &pool, "new.example", 61), Err(Exhausted), "it is the second that has much");
    assert!(given.iter().all(|ip| name_of(&pool, *ip).is_some()), "what it uses stays all the same");
}

#[test]
fn a_use_is_recorded_again_after_some_minutes() {
    let pool = pool("198.18.0.0/24", 60);
    let recorded = |now| {
        let mut heard = false;
        pool.address("a.example", [10, 0, 0, 1].into(), now, |_, _| heard = true).unwrap();
        heard
    };
    let all = [0, 1, RENEWAL - 1, RENEWAL, RENEWAL + 1, 2 * RENEWAL - 1, 2 * RENEWAL].map(recorded);
    assert_eq!(all, [true, false, false, true, false, false, true]);
}

proptest! {
    #[test]
    fn one_name_one_address_under_any_mix_of_steps(
        steps in prop::collection::vec((0u8..4, 0u8..40, 0u32..50), 0..300)
    ) {
        // 27 addresses for 40 names, so that the pool wraps.
        let pool = pool("198.18.0.0/27", 60);
        let mut now = 0;
        let mut held: Vec<(IpAddr, Name, u32)> = Vec::new();
        for (step, number, pause) in steps {
            now += pause;
            let name = format!("{number}.example");
            match step {
                0 | 1 => if let Ok(ip) = give(&pool, &name, now) {
                    prop_assert_eq!(name_of(&pool, ip), Name::new(&name).ok());
                    if step == 1 {
                        // None where so much is in use that what this one asks for cannot be kept.
                        held.extend(hold(1, &pool, ip, now).map(|slot| (ip, Name::new(&name).unwrap(), slot)));
                    }
                },
                2 if !held.is_empty() => {
                    let (_, _, slot) = held.swap_remove(usize::from(number) % held.len());
                    pool.release(slot, now, |_, _| {});
                }
                _ => {}
            }
            for (ip, name, _) in &held {
                prop_assert_eq!(name_of(&pool, *ip), Some(name.clone()));
            }
            let mut seen = std::collections::HashSet::new();
            let mut names = std::collections::HashSet::new();
            pool.visit(0, 1000, |name, ip, _| assert!(seen.insert(ip) && names.insert(name.clone())));
            prop_assert_eq!(seen.len(), pool.len());
        }
    }

    #[test]
    fn the_bitmap_finds_what_a_walk_finds(len in 1usize..300, taken in prop::collection::vec(any::<bool>(), 300), start in 0usize..300) {
        let mut bitmap = Bitmap::new(len);
        (0..len).for_each(|at| bitmap.set(at, taken[at]));
        let start = start % len;
        let walk = (start..len).chain(0..start).find(|at| !taken[*at]);
        prop_assert_eq!(bitmap.next_free(start), walk);
    }
}
