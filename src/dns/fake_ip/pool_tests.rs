use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

fn pool(range: &str, grace: u32) -> Pool {
    Pool::new(range.parse().unwrap(), grace).unwrap()
}

fn give(pool: &Pool, name: &str, now: u32) -> Result<IpAddr, Exhausted> {
    pool.address(name, now, |_, _| {})
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
        assert_eq!(pool.name_of(ip, 0).unwrap().as_str(), "a.example", "{range}");
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
    assert_eq!(pool.name_of(three[1], 40).unwrap().as_str(), "b.example", "asking for the name is a use");
    assert_eq!(give(&pool, "d.example", 60), Ok(three[2]));
    assert_eq!(pool.name_of(three[2], 60).unwrap().as_str(), "d.example");
    assert_eq!(give(&pool, "c.example", 89), Err(Exhausted));
    assert_eq!(give(&pool, "c.example", 90), Ok(three[0]));
}

#[test]
fn an_address_is_never_reused_while_a_flow_holds_it() {
    let pool = pool("198.18.0.0/24", 60);
    let held = give(&pool, "held.example", 0).unwrap();
    let slot = pool.hold(held).unwrap();
    assert_eq!(pool.hold(held), Some(slot), "two flows may hold one address");
    // Twice around, each name far enough in time for every other address to be free again.
    let mut given = HashMap::new();
    for n in 0..2 * 251_u32 {
        let name = format!("{n}.example");
        let now = n * 100;
        let ip = give(&pool, &name, now).unwrap();
        given.insert(ip, name);
        assert_ne!(ip, held);
        assert_eq!(pool.name_of(held, now).unwrap().as_str(), "held.example");
    }
    let end = 2 * 251 * 100;
    for (ip, name) in &given {
        assert_eq!(pool.name_of(*ip, end).unwrap().as_str(), name, "the last owner, not the first");
    }
    pool.release(slot, end);
    assert_eq!(pool.name_of(held, end).unwrap().as_str(), "held.example");
    pool.release(slot, end);
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
    assert_eq!(pool.name_of(ip(9), 0), None);
    assert_eq!(pool.name_of(ip(10), 0), Some(name("b.example")));
    assert_eq!(pool.len(), 1);
    let mut seen = Vec::new();
    assert!(!pool.visit(0, 100, |name, ip| seen.push((name.clone(), ip))));
    assert_eq!(seen, [(name("b.example"), ip(10))]);
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
                    prop_assert_eq!(pool.name_of(ip, now), Name::new(&name).ok());
                    if step == 1 {
                        held.push((ip, Name::new(&name).unwrap(), pool.hold(ip).unwrap()));
                    }
                },
                2 if !held.is_empty() => {
                    let (_, _, slot) = held.swap_remove(usize::from(number) % held.len());
                    pool.release(slot, now);
                }
                _ => {}
            }
            for (ip, name, _) in &held {
                prop_assert_eq!(pool.name_of(*ip, now), Some(name.clone()));
            }
            let mut seen = std::collections::HashSet::new();
            let mut names = std::collections::HashSet::new();
            pool.visit(0, 1000, |name, ip| assert!(seen.insert(ip) && names.insert(name.clone())));
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
