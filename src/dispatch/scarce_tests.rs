//! Where descriptors or ports have run out.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use tokio::task::spawn_local;

use super::fixture::{Heard, session};
use super::tests::{EVERYTHING_DIRECT, echo, local, send};
use super::*;
use crate::net::{BoxDatagram, BoxFuture};
use crate::outbound::Networks;

/// An outbound for which there is no descriptor at first.
#[derive(Default)]
struct Tight {
    asked: AtomicUsize,
}

impl Outbound for Tight {
    fn name(&self) -> &str {
        "tight"
    }

    fn networks(&self) -> Networks {
        Networks::ALL
    }

    fn connect<'a>(&'a self, _: &'a Session) -> BoxFuture<'a, Result<BoxStream, DialError>> {
        let first = self.asked.fetch_add(1, Relaxed) == 0;
        Box::pin(async move { Err(if first { DialError::Exhausted } else { DialError::Refused }) })
    }

    fn associate<'a>(&'a self, session: &'a Session) -> BoxFuture<'a, Result<BoxDatagram, DialError>> {
        Box::pin(async { self.connect(session).await.map(|_| unreachable!("it never succeeds")) })
    }
}

/// Where there are so many descriptors and no more: dials to port 9 take one each and are never answered.
struct Narrow {
    descriptors: Arc<tokio::sync::Semaphore>,
    dials: AtomicUsize,
    ports: AtomicUsize,
}

impl Narrow {
    fn new(descriptors: usize) -> Self {
        let descriptors = Arc::new(tokio::sync::Semaphore::new(descriptors));
        Self { descriptors, dials: AtomicUsize::new(0), ports: AtomicUsize::new(0) }
    }
}

impl Outbound for Narrow {
    fn name(&self) -> &str {
        "narrow"
    }

    fn networks(&self) -> Networks {
        Networks::ALL
    }

    fn connect<'a>(&'a self, session: &'a Session) -> BoxFuture<'a, Result<BoxStream, DialError>> {
        self.dials.fetch_add(1, Relaxed);
        Box::pin(async move {
            let _descriptor = self.descriptors.try_acquire().map_err(|_| DialError::Exhausted)?;
            match session.destination.port {
                9 => std::future::pending().await,
                _ => Err(DialError::Refused),
            }
        })
    }

    fn associate<'a>(&'a self, session: &'a Session) -> BoxFuture<'a, Result<BoxDatagram, DialError>> {
        self.ports.fetch_add(1, Relaxed);
        if session.destination.port == 1080 {
            return Box::pin(async { Err(DialError::NoControlPort) });
        }
        Box::pin(async { Err(io::Error::from_raw_os_error(libc::EADDRINUSE).into()) })
    }
}

#[tokio::test(start_paused = true)]
async fn dials_that_nobody_answers_give_way_to_another_client_and_associations_in_use_stay() {
    local(async {
        let (server, _) = echo("127.0.0.1").await;
        let (dispatcher, heard) = (EVERYTHING_DIRECT.dispatcher(), Rc::<Heard>::default());
        let narrow = Rc::new(Narrow::new(32));
        let of = |client: u8, port| Session {
            source: SocketAddr::from(([192, 0, 2, client], 4000)),
            ..session(Network::Tcp, "192.0.2.7", port)
        };
        let lost = Rc::<Cell<usize>>::default();
        for _ in 0..32 {
            let (dispatcher, narrow, lost, flow) = (dispatcher.clone(), narrow.clone(), lost.clone(), of(9, 9));
            spawn_local(async move {
                let error = dispatcher.connect(&*narrow, &flow).await.err();
                assert!(matches!(error, Some(DialError::Exhausted)));
                lost.set(lost.get() + 1);
            });
        }
        tokio::task::yield_now().await;
        assert_eq!(narrow.descriptors.available_permits(), 0);
        send(&dispatcher, &server.into(), b"?", &(heard.clone() as Rc<dyn Back>));
        heard.times(1).await;
        let begun = Deadline::now();
        let error = dispatcher.connect(&*narrow, &of(1, 80)).await.err().unwrap();
        assert!(matches!(error, DialError::Refused), "it was dialled: {error}");
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
        tokio::task::yield_now().await;
        let counters = &dispatcher.core().counters;
        assert_eq!((lost.get(), counters.given_up.load(Relaxed), counters.evicted.load(Relaxed)), (2, 2, 0));
        assert_eq!(counters.associations.load(Relaxed), 1);
    })
    .await;
}

#[tokio::test]
async fn without_a_local_port_some_associations_give_theirs_and_not_all_where_that_helps_nobody() {
    local(async {
        let (server, _) = echo("127.0.0.1").await;
        let (dispatcher, heard) = (EVERYTHING_DIRECT.dispatcher(), Rc::<Heard>::default());
        for port in 1..=6 {
            let from = Session { source: SocketAddr::from(([192, 0, 2, 1], port)), ..session(Network::Udp, "::1", 7) };
            let to = Session { destination: server.into(), ..from };
            dispatcher.datagram(to, b"?", false, &(heard.clone() as Rc<dyn Back>));
        }
        heard.times(6).await;
        let narrow = Narrow::new(1);
        let error = dispatcher.associate(&narrow, &session(Network::Udp, "192.0.2.7", 1080)).await.err().unwrap();
        assert!(matches!(error, DialError::NoControlPort), "{error}");
        assert_eq!(reach(&error), None);
        let counters = &dispatcher.core().counters;
        let tried = (narrow.ports.swap(0, Relaxed), counters.associations.load(Relaxed));
        assert_eq!(tried, (1, 6), "ports of UDP are no help to a connection");
        let error = dispatcher.associate(&narrow, &session(Network::Udp, "192.0.2.7", 7)).await.err().unwrap();
        assert!(matches!(error, DialError::NoPort), "{error}");
        assert_eq!((narrow.ports.load(Relaxed), counters.associations.load(Relaxed)), (4, 3));
        assert_eq!((refusal(&error), reach(&error)), (Refusal::Host, None), "and nobody has refused");
    })
    .await;
}

#[tokio::test]
async fn without_descriptors_an_idle_association_goes_and_the_dial_is_tried_once_more() {
    local(async {
        let (server, _) = echo("127.0.0.1").await;
        let (dispatcher, heard) = (EVERYTHING_DIRECT.dispatcher(), Rc::<Heard>::default());
        let flow = session(Network::Tcp, "192.0.2.7", 80);
        let error = dispatcher.connect(&Tight::default(), &flow).await.err().unwrap();
        assert!(matches!(error, DialError::Exhausted), "there is nothing to give up: {error}");
        assert_eq!((refusal(&error), reach(&error)), (Refusal::Host, None), "and nobody has refused");

        for _ in 0..2 {
            let seen = heard.words().len();
            send(&dispatcher, &server.into(), b"?", &(heard.clone() as Rc<dyn Back>));
            heard.times(seen + 1).await;
            let error = dispatcher.connect(&Tight::default(), &flow).await.err().unwrap();
            assert!(matches!(error, DialError::Refused), "{error}");
            assert_eq!(dispatcher.core().counters.associations.load(Relaxed), 0);
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn many_that_wait_for_descriptors_try_one_at_a_time_and_all_go_on_when_some_become_free() {
    local(async {
        let dispatcher = EVERYTHING_DIRECT.dispatcher();
        let narrow = Rc::new(Narrow::new(0));
        let carried = &dispatcher.core().carried;
        let seats: Vec<_> = (0..10).map(|_| carried.enter([192, 0, 2, 7].into())).collect();
        let refused = Rc::<Cell<usize>>::default();
        for _ in 0..500 {
            let (dispatcher, narrow, refused) = (dispatcher.clone(), narrow.clone(), refused.clone());
            spawn_local(async move {
                let flow = Session { source: ([192, 0, 2, 9], 4000).into(), ..session(Network::Tcp, "192.0.2.7", 80) };
                let error = dispatcher.connect(&*narrow, &flow).await.err().unwrap();
                refused.set(refused.get() + usize::from(matches!(error, DialError::Refused)));
            });
        }
        for _ in 0..20 {
            seats.iter().for_each(|seat| seat.pulse().beat());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let tried = narrow.dials.load(Relaxed);
        assert!((501..1000).contains(&tried), "{tried}");
        narrow.descriptors.add_permits(1);
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(refused.get(), 500, "each left its descriptor to the next");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn who_holds_most_flows_in_use_gets_no_association_in_use_and_another_client_does() {
    local(async {
        let (server, _) = echo("127.0.0.1").await;
        let (dispatcher, heard) = (EVERYTHING_DIRECT.dispatcher(), Rc::<Heard>::default());
        let (core, narrow) = (Arc::clone(dispatcher.core()), Narrow::new(0));
        let mut seats: Vec<_> = (0..20).map(|_| core.carried.enter([192, 0, 2, 9].into())).collect();
        seats.push(core.carried.enter([192, 0, 2, 8].into()));
        // Opened first, and again whenever it has been ended.
        let opened = Rc::<Cell<usize>>::default();
        let (using, noted) = (dispatcher.clone(), opened.clone());
        let beating = spawn_local(async move {
            loop {
                let gone = using.core().counters.associations.load(Relaxed) == 0;
                noted.set(noted.get() + usize::from(gone));
                send(&using, &server.into(), b"?", &(heard.clone() as Rc<dyn Back>));
                seats.iter().for_each(|seat| seat.pulse().beat());
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        for (client, ends) in [(9, false), (8, true)] {
            let source = SocketAddr::from(([192, 0, 2, client], 4000));
            let flow = Session { source, ..session(Network::Tcp, "192.0.2.7", 80) };
            assert!(matches!(dispatcher.connect(&narrow, &flow).await, Err(DialError::Exhausted)));
            assert_eq!(opened.get() > 1, ends, "{client}");
        }
        beating.abort();
    })
    .await;
}
