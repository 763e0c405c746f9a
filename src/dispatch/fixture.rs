//! What the tests of this module share: a dispatcher with rules, and a client that writes down what it hears.

use std::cell::RefCell;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use hickory_proto::op::{Message, MessageType, OpCode, Query};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::net::UdpSocket;
use tokio::sync::Notify;

use super::link::{Flow, Link, Opened};
use super::{Account, Back, Core, Counters, Dispatcher, Router};
use crate::dns::{self, Answer, Dns, Mode, Source, Transport, Upstream};
use crate::net::{Address, Host, Reach};
use crate::outbound::fixture::table_knowing;
use crate::platform::Dialer;
use crate::rules::{Line, parse};
use crate::session::{Inbound, Network, Session};

/// Where the client of most tests sends from.
pub(super) fn source() -> SocketAddr {
    SocketAddr::from(([192, 0, 2, 1], 4000))
}

pub(super) fn address(host: &str, port: u16) -> Address {
    Address { host: Host::parse(host).unwrap(), port }
}

pub(super) fn session(network: Network, host: &str, port: u16) -> Session {
    Session::new(network, Inbound::Tun, source(), address(host, port))
}

/// Writes down what a client is handed: from whom, what, and for a train the size of each.
#[derive(Default)]
pub(super) struct Heard {
    pub(super) payloads: RefCell<Vec<(Address, Vec<u8>, u16)>>,
    pub(super) errors: RefCell<Vec<(Address, Reach)>>,
    news: Notify,
}

impl Heard {
    /// A way back that nobody reads.
    pub(super) fn back() -> Rc<dyn Back> {
        Rc::<Self>::default()
    }

    /// Returns once the client has heard this often, payloads and errors together.
    pub(super) async fn times(&self, many: usize) {
        while self.payloads.borrow().len() + self.errors.borrow().len() < many {
            self.news.notified().await;
        }
    }

    /// The payloads as text, each behind its peer, in order of the peers.
    pub(super) fn words(&self) -> Vec<String> {
        let payloads = self.payloads.borrow();
        let mut words: Vec<_> =
            payloads.iter().map(|(from, payload, _)| format!("{from} {}", String::from_utf8_lossy(payload))).collect();
        words.sort();
        words
    }
}

impl Back for Heard {
    fn deliver(&self, from: &Address, _: SocketAddr, payload: &[u8]) {
        self.payloads.borrow_mut().push((from.clone(), payload.to_vec(), 0));
        self.news.notify_one();
    }

    fn deliver_train(&self, from: &Address, _: SocketAddr, train: &[u8], size: NonZeroU16) {
        self.payloads.borrow_mut().push((from.clone(), train.to_vec(), size.get()));
        self.news.notify_one();
    }

    fn unreachable(&self, from: &Address, _: SocketAddr, _: &[u8], why: Reach) {
        self.errors.borrow_mut().push((from.clone(), why));
        self.news.notify_one();
    }
}

/// A flow of `link` to `to`.
pub(super) fn flow(link: &Rc<Link>, to: &Address) -> Rc<Flow> {
    let session = Session::new(Network::Udp, Inbound::Tun, link.source, to.clone());
    let account = Account::new(Arc::default(), session, None);
    let opened = Opened { to: to.clone(), quoted: Box::default(), account, held: None, sending: None };
    let flow = Flow::new(to.clone(), opened, Duration::from_secs(300));
    link.carry(&flow);
    flow
}

/// What a dispatcher is to know.
#[derive(Clone, Copy)]
pub(super) struct World<'a> {
    pub(super) proxies: &'a str,
    pub(super) rules: &'a [&'a str],
    /// What the outbounds' own look-ups find.
    pub(super) names: &'a [(&'a str, &'a [&'a str])],
}

impl World<'_> {
    /// A dispatcher without nameservers.
    pub(super) fn dispatcher(&self) -> Rc<Dispatcher> {
        self.dispatcher_with(dns(Mode::Plain, Vec::new()))
    }

    pub(super) fn dispatcher_with(&self, dns: Dns) -> Rc<Dispatcher> {
        let (outbounds, report) = table_knowing(&format!("proxies: [{}]", self.proxies), self.names);
        assert!(!report.has_errors(), "{report}");
        let rules = self.rules.iter().map(|line| match parse(line) {
            Ok(Line::Rule(rule)) => rule,
            other => panic!("{line}: {other:?}"),
        });
        let router = Router::new(crate::profile::Mode::Rule, rules.collect(), |name| outbounds.index(name)).unwrap();
        Dispatcher::new(Arc::new(Core {
            router: ArcSwap::from_pointee(router),
            outbounds: Arc::new(outbounds),
            dns: Arc::new(dns),
            counters: Arc::new(Counters::default()),
            udp_timeout: Duration::from_secs(300),
            icmp_timeout: Duration::from_secs(60),
            echo_ids: Arc::default(),
            own: None,
            carried: Arc::default(),
            mappings: Arc::default(),
            memory: 1 << 30,
        }))
    }
}

pub(super) fn dns(mode: Mode, nameservers: Vec<Source>) -> Dns {
    let runtime = tokio::runtime::Handle::current();
    let (tracers, dialer) = (Arc::default(), Dialer::default());
    let config = dns::Config { ipv6: false, mode, nameservers, tracers, dialer, log: None, runtime };
    Dns::open(config).unwrap()
}

/// A service whose client has just asked for `name`, and got the address `ip` from a nameserver.
pub(super) async fn dns_that_told(mode: Mode, name: &str, ip: IpAddr) -> Dns {
    let IpAddr::V4(ip) = ip else { panic!("IPv4 is meant") };
    let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let dns = dns(mode, vec![Upstream { address: server.local_addr().unwrap(), tcp_only: false }.into()]);
    let mut query = Message::new(7, MessageType::Query, OpCode::Query);
    query.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    let mut reply = Vec::new();
    let (query, now) = (query.to_vec().unwrap(), std::time::Instant::now());
    let asked = dns.answer(&query, Transport::Udp, source().ip(), now, &mut reply);
    let Answer::Ask(question) = asked else { panic!("it is in no cache yet") };
    let answering = async {
        let mut space = [0; 512];
        let (length, client) = server.recv_from(&mut space).await.unwrap();
        let query = Message::from_vec(&space[..length]).unwrap();
        let mut answer = Message::response(query.metadata.id, OpCode::Query);
        answer.add_queries(query.queries.clone());
        answer.add_answer(Record::from_rdata(query.queries[0].name().clone(), 60, RData::A(A(ip))));
        server.send_to(&answer.to_vec().unwrap(), client).await.unwrap();
    };
    tokio::join!(dns.ask(question), answering);
    dns
}
