//! smoltcp as the client: another implementation's ends of the flows, on a device of its own.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::num::{NonZeroU16, NonZeroUsize};
use std::task::Poll;
use std::time::{Duration, Instant};

use smoltcp::iface::{Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{self, Checksum, DeviceCapabilities, Medium, PacketMeta};
use smoltcp::socket::tcp::{self, State};
use smoltcp::wire::{HardwareAddress, IpCidr, Ipv4Address, Ipv6Address};
use tunproxy::stack::VirtioHeader;

use super::{MTU, Net, World, kernel, pattern};

pub(super) struct Client {
    interface: Interface,
    device: Wire,
    sockets: SocketSet<'static>,
    epoch: Instant,
    /// It leaves checksums and segmentation to its kernel.
    cuts: bool,
    /// The kernel around this client hands super-packets on uncut.
    whole: bool,
}

struct Wire {
    capabilities: DeviceCapabilities,
    received: VecDeque<Vec<u8>>,
    sent: Vec<(Vec<u8>, Option<NonZeroU16>)>,
}

impl Client {
    pub(super) fn new(net: &Net) -> Self {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        if net.offload {
            capabilities.segmentation.tcpv4 = NonZeroUsize::new(64_000);
            capabilities.segmentation.tcpv6 = NonZeroUsize::new(64_000);
            capabilities.checksum.tcp = Checksum::Rx;
        }
        let mut device = Wire { capabilities, received: VecDeque::new(), sent: Vec::new() };
        let mut config = smoltcp::iface::Config::new(HardwareAddress::Ip);
        config.random_seed = net.seed ^ 0x00c1_1e47;
        let mut interface = Interface::new(config, &mut device, smoltcp::time::Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(net.client().into(), 24)).expect("there is room for one address");
        });
        interface.routes_mut().add_default_ipv4_route(Ipv4Address::new(192, 0, 2, 1)).expect("there is room");
        interface
            .routes_mut()
            .add_default_ipv6_route(Ipv6Address::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1))
            .expect("there is room");
        let whole = net.offload && net.own;
        Self { interface, device, sockets: SocketSet::new(Vec::new()), epoch: Instant::now(), cuts: net.offload, whole }
    }

    fn time(&self, now: Instant) -> smoltcp::time::Instant {
        let micros = now.saturating_duration_since(self.epoch).as_micros();
        smoltcp::time::Instant::from_micros(micros as i64)
    }

    pub(super) fn receive(&mut self, packet: Vec<u8>) {
        self.device.received.push_back(packet);
    }

    /// Everything that this client has to say now.
    pub(super) fn poll(&mut self, now: Instant) -> Vec<(VirtioHeader, Vec<u8>)> {
        let time = self.time(now);
        while self.interface.poll(time, &mut self.device, &mut self.sockets) == PollResult::SocketStateChanged
            && !self.device.received.is_empty()
        {}
        let mut packets = Vec::new();
        for (mut bytes, gso) in std::mem::take(&mut self.device.sent) {
            if !self.cuts {
                packets.push((VirtioHeader::PLAIN, bytes));
                continue;
            }
            let header = VirtioHeader::seal(&mut bytes, gso);
            if self.whole {
                packets.push((header, bytes));
            } else {
                packets.extend(kernel::finish(bytes, header).into_iter().map(|bytes| (VirtioHeader::PLAIN, bytes)));
            }
        }
        packets
    }

    pub(super) fn deadline(&mut self, now: Instant) -> Option<Instant> {
        let time = self.time(now);
        let at = self.interface.poll_at(time, &self.sockets)?;
        Some((self.epoch + Duration::from_micros(at.total_micros() as u64)).max(now))
    }
}

impl phy::Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Received, Sending<'_>)> {
        let packet = self.received.pop_front()?;
        Some((Received(packet), Sending { sent: &mut self.sent, gso: None }))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Sending<'_>> {
        Some(Sending { sent: &mut self.sent, gso: None })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.capabilities.clone()
    }
}

struct Received(Vec<u8>);

impl phy::RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

struct Sending<'a> {
    sent: &'a mut Vec<(Vec<u8>, Option<NonZeroU16>)>,
    gso: Option<NonZeroU16>,
}

impl phy::TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        let mut bytes = vec![0; len];
        let result = write(&mut bytes);
        self.sent.push((bytes, self.gso));
        result
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.gso = meta.segmentation_offload_size;
    }
}

/// One connection of the client.
#[derive(Clone)]
pub(crate) struct Conn {
    world: World,
    handle: SocketHandle,
}

/// The connection is over, and not by a FIN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ended;

impl World {
    /// Opens a connection to `port` of the server from `local`.
    pub(crate) fn connect_from(&self, local: u16, port: u16) -> Conn {
        let buffer = || tcp::SocketBuffer::new(vec![0; self.net().buffer]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        let handle = self.0.client.borrow_mut().sockets.add(socket);
        let conn = Conn { world: self.clone(), handle };
        conn.open(local, port);
        conn
    }

    /// Opens a connection from some port.
    pub(crate) fn connect(&self, port: u16) -> Conn {
        let used = self.0.client.borrow().sockets.iter().count();
        self.connect_from(40_000 + used as u16, port)
    }
}

impl Conn {
    fn with<T>(&self, act: impl FnOnce(&mut tcp::Socket<'static>) -> T) -> T {
        act(self.world.0.client.borrow_mut().sockets.get_mut::<tcp::Socket<'static>>(self.handle))
    }

    /// Opens it (again) from `local`; it must be closed.
    pub(crate) fn open(&self, local: u16, port: u16) {
        let net = self.world.net();
        let (here, there) = (SocketAddr::new(net.client(), local), SocketAddr::new(net.server(), port));
        let mut client = self.world.0.client.borrow_mut();
        let Client { interface, sockets, .. } = &mut *client;
        let socket = sockets.get_mut::<tcp::Socket<'static>>(self.handle);
        socket.connect(interface.context(), there, here).expect("the socket is closed");
    }

    pub(crate) fn state(&self) -> State {
        self.with(|socket| socket.state())
    }

    /// Until the handshake is over, one way or the other.
    pub(crate) async fn established(&self) -> Result<(), Ended> {
        poll_fn(|cx| {
            self.with(|socket| {
                socket.register_recv_waker(cx.waker());
                socket.register_send_waker(cx.waker());
                match socket.state() {
                    State::SynSent | State::SynReceived => Poll::Pending,
                    State::Closed => Poll::Ready(Err(Ended)),
                    _ => Poll::Ready(Ok(())),
                }
            })
        })
        .await
    }

    /// Until the connection is over in both directions.
    pub(crate) async fn closed(&self) {
        poll_fn(|cx| {
            self.with(|socket| {
                socket.register_recv_waker(cx.waker());
                socket.register_send_waker(cx.waker());
                if matches!(socket.state(), State::Closed | State::TimeWait) { Poll::Ready(()) } else { Poll::Pending }
            })
        })
        .await;
    }

    pub(crate) async fn write(&self, mut bytes: &[u8]) -> Result<(), Ended> {
        while !bytes.is_empty() {
            let put = poll_fn(|cx| {
                self.with(|socket| {
                    if !socket.may_send() {
                        return Poll::Ready(Err(Ended));
                    }
                    match socket.send_slice(bytes) {
                        Ok(0) => {
                            socket.register_send_waker(cx.waker());
                            Poll::Pending
                        }
                        Ok(put) => Poll::Ready(Ok(put)),
                        Err(_) => Poll::Ready(Err(Ended)),
                    }
                })
            })
            .await?;
            bytes = &bytes[put..];
        }
        Ok(())
    }

    pub(crate) async fn write_pattern(&self, length: usize) -> Result<(), Ended> {
        let mut at = 0;
        while at < length {
            let part = pattern(at, (length - at).min(60_000));
            self.write(&part).await?;
            at += part.len();
        }
        Ok(())
    }

    /// What has come; nothing is the end.
    pub(crate) async fn read(&self) -> Result<Vec<u8>, Ended> {
        poll_fn(|cx| {
            self.with(|socket| match socket.recv(|bytes| (bytes.len(), bytes.to_vec())) {
                Ok(bytes) if bytes.is_empty() => {
                    socket.register_recv_waker(cx.waker());
                    Poll::Pending
                }
                Ok(bytes) => Poll::Ready(Ok(bytes)),
                Err(tcp::RecvError::Finished) => Poll::Ready(Ok(Vec::new())),
                Err(tcp::RecvError::InvalidState) => Poll::Ready(Err(Ended)),
            })
        })
        .await
    }

    /// Reads to the end and returns how long it was; what came must be the pattern.
    pub(crate) async fn read_pattern(&self) -> Result<usize, Ended> {
        let mut at = 0;
        loop {
            let part = self.read().await?;
            if part.is_empty() {
                return Ok(at);
            }
            assert!(part == pattern(at, part.len()), "other bytes than were sent, after {at}");
            at += part.len();
        }
    }

    /// FIN.
    pub(crate) fn shutdown(&self) {
        self.with(tcp::Socket::close);
    }

    /// RST.
    pub(crate) fn abort(&self) {
        self.with(tcp::Socket::abort);
    }
}
