//! What echo requests may cost.

use super::super::super::echoes::{COST, Echoes, PART};
use super::*;

#[tokio::test]
async fn what_waits_is_bounded_in_number_and_bytes() {
    let counters = Arc::<crate::dispatch::Counters>::default();
    let mut echoes = Echoes::new(Arc::clone(&counters));
    let packet = vec![0; 60_000];
    let mut lost = 0;
    for id in 0..100 {
        let mut ping = ask("192.0.2.1", "198.51.100.9", 1);
        (ping.echo.id, ping.packet) = (id, &packet);
        let key = Key { source: ping.source, destination: ping.destination, id };
        echoes.begin(key, &ping).unwrap();
        lost += (0..10).filter(|_| !echoes.wait(&key, &ping)).count();
    }
    assert!(lost > 900, "{lost}");
    for id in 0..100 {
        echoes.forget(&Key { source: ip("192.0.2.1"), destination: ip("198.51.100.9"), id }, &"test");
    }
    let ping = ask("192.0.2.1", "198.51.100.9", 1);
    let key = Key { source: ping.source, destination: ping.destination, id: 7 };
    echoes.begin(key, &ping).unwrap();
    assert_eq!((0..20).filter(|_| echoes.wait(&key, &ping)).count(), 7);
    echoes.forget(&key, &"test");
    assert_eq!(counters.queue.bytes(), 0, "what is forgotten costs nothing");
}

#[tokio::test(start_paused = true)]
async fn flows_are_paid_for_out_of_the_memory_limit_whatever_became_of_them() {
    local(async {
        let bench = Bench::new(&World { rules: &["MATCH,REJECT-DROP"], ..DIRECT }, Net::default());
        let counters = Arc::<crate::dispatch::Counters>::default();
        let queue = &counters.queue;
        queue.limit(100 * PART * COST);
        *bench.dispatcher.echoes.borrow_mut() = Echoes::new(Arc::clone(&counters));
        bench.open(&ask("192.0.2.1", "198.51.100.9", 1), "198.51.100.9");
        // Far more than there is room for, all of them refused: each is remembered for a while.
        for id in 0..10_000 {
            let mut ping = ask("192.0.2.2", "198.51.100.8", 1);
            ping.echo.id = id;
            bench.dispatcher.echo(&ping, &bench.back);
            assert!(queue.bytes() <= 100 * COST, "{}", queue.bytes());
            if id % 100 == 99 {
                yield_now().await;
            }
        }
        while bench.dispatcher.core.counters.rejected.load(Relaxed) == 0 {
            yield_now().await;
        }
        assert!((50..=100).contains(&bench.flows()), "{}", bench.flows());
        assert!(queue.bytes() >= bench.flows() * COST);
        sleep(REFUSED_FOR * 3).await;
        assert_eq!(bench.flows(), 1, "refusals are over, and the modest client's flow is there");
        assert_eq!(queue.bytes(), COST);
    })
    .await;
}

#[tokio::test]
async fn all_addresses_of_a_64_are_one_client() {
    let mut echoes = Echoes::new(Arc::default());
    let mut begin = |source: &str| {
        let ping = ask(source, "2001:db8:f::9", 1);
        let key = Key { source: ping.source, destination: ping.destination, id: ping.echo.id };
        echoes.begin(key, &ping).unwrap();
        key
    };
    let modest: Vec<_> = (1..=3).map(|host| begin(&format!("2001:db8:1:{host}::1"))).collect();
    let neighbour: Vec<_> = (1..=3).map(|host| begin(&format!("2001:db8:2::{host}"))).collect();
    for host in 0..2 * MOST {
        begin(&format!("2001:db8:3::{host:x}"));
    }
    assert!(modest.iter().chain(&neighbour).all(|key| echoes.find(key).is_some()), "nobody else loses any");
    assert!((MOST_OF_ONE / 2..=MOST_OF_ONE + 6).contains(&echoes.len()), "{}", echoes.len());
}

#[tokio::test]
async fn long_heads_are_remembered_for_fewer_requests() {
    local(async {
        let bench = Bench::new(&DIRECT, Net::default());
        bench.open(&ask("192.0.2.1", "198.51.100.9", 0), "198.51.100.9");
        let (id, host, expired) = (bench.last_id(), ip("198.51.100.9"), EchoFailure { kind: 11, code: 0, word: 0 });
        let head = [b'h'; 120];
        for sequence in 1..=20 {
            bench.dispatcher.echo(&Ping { head: &head, ..ask("192.0.2.1", "198.51.100.9", sequence) }, &bench.back);
        }
        // 17 of 120 bytes fit into 2048.
        for (sequence, router) in [(3, "203.0.113.3"), (4, "203.0.113.4")] {
            bench.net.error(router, host, id, sequence, expired);
        }
        let told = bench.heard.times(1).await;
        assert!(told[0].starts_with("Some(203.0.113.4)"), "{told:?}");
    })
    .await;
}
