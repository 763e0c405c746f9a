use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;

use super::*;
use crate::dns::filter::{FilterMode, Wildcards};

const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));

struct Bed {
    _folder: tempfile::TempDir,
    path: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Bed {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fake-ip");
        Self { _folder: folder, path, runtime: tokio::runtime::Builder::new_current_thread().build().unwrap() }
    }

    fn open_with(&self, range: &str, real: &[&str]) -> Arc<FakeIp> {
        let mut wildcards = Wildcards::default();
        real.iter().for_each(|pattern| wildcards.insert(pattern).unwrap());
        let filter = Filter::new(wildcards, FilterMode::Blacklist);
        let ranges = (range.parse().unwrap(), Some("fdfe:dcba:9877::/64".parse().unwrap()));
        Arc::new(FakeIp::open(ranges, filter, 1, Some(&self.path), self.runtime.handle().clone()).unwrap())
    }

    fn open(&self) -> Arc<FakeIp> {
        self.open_with("198.18.0.1/16", &[])
    }
}

fn name(number: usize) -> String {
    format!("host{number}.example")
}

fn both(fake: &FakeIp, number: usize) -> [IpAddr; 2] {
    [false, true].map(|v6| fake.address(&name(number), v6, CLIENT, fake.start).unwrap())
}

#[test]
fn a_restart_after_a_kill_gives_the_same_addresses() {
    let bed = Bed::new();
    let first = bed.open();
    let given: Vec<_> = (0..3000).map(|number| both(&first, number)).collect();
    first.flush();
    // The first run is not closed: its file is as a kill would leave it, plus half a record.
    OpenOptions::new().append(true).open(&bed.path).unwrap().write_all(&[4, 9, 198, 18]).unwrap();
    let second = bed.open();
    for (number, ips) in given.iter().enumerate() {
        for ip in ips {
            assert_eq!(second.name_of(*ip), Fake::Name(Name::new(&name(number)).unwrap()));
        }
    }
    // What comes after the torn record is read again as well.
    let late = both(&second, 9999);
    second.flush();
    let third = bed.open();
    late.iter().for_each(|ip| assert_ne!(third.name_of(*ip), Fake::Unknown));
    assert_eq!(third.names(), 2 * 3001);
}

#[test]
fn names_whose_records_were_lost_get_the_same_addresses_again() {
    let bed = Bed::new();
    let first = bed.open();
    let given: Vec<_> = (0..200).map(|number| both(&first, number)).collect();
    first.flush();
    let length = fs::metadata(&bed.path).unwrap().len();
    OpenOptions::new().write(true).open(&bed.path).unwrap().set_len(length / 2).unwrap();
    let second = bed.open();
    assert!(second.names() < 400 && second.names() > 100);
    for (number, ips) in given.iter().enumerate() {
        assert_eq!(both(&second, number), *ips);
    }
}

#[test]
fn entries_that_a_new_range_or_filter_leaves_without_a_place_are_dropped() {
    let bed = Bed::new();
    let first = bed.open();
    let [kept4, kept6] = both(&first, 1);
    let filtered = first.address("a.real.example", false, CLIENT, first.start).unwrap();
    first.flush();
    let second = bed.open_with("198.18.0.1/16", &["+.real.example"]);
    assert_eq!(second.name_of(filtered), Fake::Unknown);
    assert_ne!(second.name_of(kept4), Fake::Unknown);
    let third = bed.open_with("10.128.0.0/16", &[]);
    assert_eq!(third.name_of(kept4), Fake::NotFake);
    assert_ne!(third.name_of(kept6), Fake::Unknown);
}

#[test]
fn an_address_that_nobody_was_given_is_unknown_and_a_real_one_is_not_fake() {
    let fake = Bed::new().open();
    assert_eq!(fake.name_of([198, 18, 200, 200].into()), Fake::Unknown);
    assert_eq!(fake.name_of([198, 18, 0, 1].into()), Fake::Unknown);
    assert_eq!(fake.name_of([203, 0, 113, 1].into()), Fake::NotFake);
    let fake = Arc::new(fake);
    let met = |ip: [u8; 4]| fake.hold(ip.into(), CLIENT, fake.start).0;
    assert_eq!([met([198, 18, 200, 200]), met([203, 0, 113, 1])], [Fake::Unknown, Fake::NotFake]);
}

#[test]
fn a_log_that_cannot_be_written_leaves_the_pool_at_work() {
    let mut bed = Bed::new();
    bed.path = PathBuf::from("/proc/nowhere/fake-ip");
    let fake = bed.open();
    let ips = both(&fake, 1);
    fake.flush();
    assert_eq!(both(&fake, 1), ips);
}

#[test]
fn threads_that_ask_for_the_same_names_agree_and_all_of_it_is_logged() {
    let bed = Bed::new();
    let fake = bed.open();
    let threads: Vec<_> = (0..4)
        .map(|thread| {
            let fake = Arc::clone(&fake);
            std::thread::spawn(move || {
                let order = (0..2000).map(|step| (step * (2 * thread + 1) + thread * 7) % 2000);
                let mut given: Vec<_> = order.map(|number| (number, both(&fake, number))).collect();
                fake.flush();
                given.sort();
                given.dedup();
                given
            })
        })
        .collect();
    let mut all: Vec<_> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 2000, "one pair of addresses a name");
    assert_eq!(log::read(&bed.path).unwrap().records.len(), 4000, "each is written once");
}

#[test]
fn the_log_is_compacted_when_it_is_mostly_history() {
    let bed = Bed::new();
    // 251 addresses: after that every name is written in another's place.
    let fake = bed.open_with("198.18.0.0/24", &[]);
    let mut largest = 0;
    for number in 0..200_000 {
        let now = fake.start + std::time::Duration::from_secs(100 * number as u64);
        fake.address(&name(number), false, CLIENT, now).unwrap();
        if number % 500 == 0 {
            fake.flush();
            largest = largest.max(fs::metadata(&bed.path).unwrap().len());
            while *fake.compaction.lock() == Compaction::Running {
                // The task runs on the runtime's blocking threads.
                std::thread::yield_now();
            }
        }
    }
    fake.flush();
    let now = fs::metadata(&bed.path).unwrap().len();
    assert!(largest > SLACK && now < largest, "{now} bytes after {largest}");
    assert_eq!(log::read(&bed.path).unwrap().records.last().unwrap().name.as_str(), name(199_999));
    let again = bed.open_with("198.18.0.0/24", &[]);
    assert_eq!(again.names(), 251);
}

#[test]
fn after_a_restart_with_a_full_pool_the_oldest_names_make_room_and_the_youngest_stay() {
    let bed = Bed::new();
    let seconds = |fake: &FakeIp, n: u64| fake.start + std::time::Duration::from_secs(n);
    let first = bed.open_with("198.18.0.0/27", &[]);
    // 27 addresses: a name a minute for hours, and then two more.
    let give = |fake: &FakeIp, number, at| fake.address(&name(number), false, CLIENT, seconds(fake, at)).unwrap();
    for number in 0..200 {
        give(&first, number, 100 * number as u64);
    }
    let young = [200, 201].map(|number| give(&first, number, 20_000));
    // Renewed not long before, which is recorded.
    let renewed = give(&first, 190, 20_010);
    first.flush();
    drop(first);
    let second = bed.open_with("198.18.0.0/27", &[]);
    assert_eq!(second.names(), 27);
    for number in 300..310 {
        give(&second, number, 0);
    }
    for (ip, number) in [(young[0], 200), (young[1], 201), (renewed, 190)] {
        assert_eq!(second.name_of(ip), Fake::Name(Name::new(&name(number)).unwrap()));
    }
    // Nothing goes before its time, and then all of it.
    assert!((400..440).any(|number| second.address(&name(number), false, CLIENT, second.start).is_err()));
    give(&second, 500, 61);
}

#[test]
fn time_goes_on_where_the_last_run_left_it_whatever_the_clock_of_the_host_says() {
    let bed = Bed::new();
    let at = |fake: &FakeIp, seconds| fake.seconds(fake.start + std::time::Duration::from_secs(seconds));
    for run in 0..3 {
        let fake = bed.open();
        assert_eq!(at(&fake, 0), run * 500);
        let now = fake.start + std::time::Duration::from_secs(500);
        fake.address(&name(run as usize), false, CLIENT, now).unwrap();
        fake.flush();
    }
}

#[test]
fn a_log_that_is_taken_away_is_written_anew_and_gone_on_with() {
    let bed = Bed::new();
    let fake = bed.open();
    both(&fake, 1);
    fake.flush();
    assert!(!fake.put_back(), "nothing is missing");
    fs::remove_file(&bed.path).unwrap();
    both(&fake, 2);
    assert!(fake.put_back());
    assert!(!fake.put_back());
    let folder = bed.path.parent().unwrap();
    fs::remove_dir_all(folder).unwrap();
    assert!(!fake.put_back(), "it has no place");
    fs::create_dir(folder).unwrap();
    assert!(fake.put_back(), "now it has");
    both(&fake, 3);
    fake.flush();
    let records = log::read(&bed.path).unwrap().records;
    assert!((1..=3).all(|number| records.iter().filter(|record| record.name.as_str() == name(number)).count() >= 2));
}
