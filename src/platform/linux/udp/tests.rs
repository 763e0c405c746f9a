//! On loopback sockets.

use std::future::poll_fn;

use super::*;

async fn send_to(socket: &mut DatagramSocket, payload: &[u8], to: SocketAddr, df: bool) -> io::Result<()> {
    poll_fn(|cx| socket.poll_send_to(cx, payload, to, df)).await
}

async fn receive(socket: &mut DatagramSocket) -> (Arrival, Vec<u8>) {
    let mut space = vec![0; 2048];
    let mut buffer = ReadBuf::new(&mut space);
    let arrival = poll_fn(|cx| socket.poll_recv_from(cx, &mut buffer)).await.unwrap();
    (arrival, buffer.filled().to_vec())
}

fn bound(to: &str) -> UdpSocket {
    let socket = UdpSocket::bind(to).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

#[tokio::test]
async fn a_closed_port_is_told_without_another_send_and_others_go_on() {
    for local in ["127.0.0.1:0", "[::1]:0"] {
        let closed = bound(local).local_addr().unwrap();
        let peer = bound(local);
        let mut socket = DatagramSocket::new(bound(local)).unwrap();
        send_to(&mut socket, b"one", closed, true).await.unwrap();
        let (arrival, payload) = receive(&mut socket).await;
        assert_eq!(arrival, Arrival::Failed { to: closed, why: Reach::Port });
        assert!(payload.is_empty());

        // The echo of another peer's error must not hit a good send.
        send_to(&mut socket, b"two", closed, false).await.unwrap();
        send_to(&mut socket, b"three", peer.local_addr().unwrap(), false).await.unwrap();
        peer.set_nonblocking(false).unwrap();
        let mut space = [0; 16];
        let (length, from) = peer.recv_from(&mut space).unwrap();
        assert_eq!((&space[..length], from), (&b"three"[..], socket.local_addr().unwrap()));
        assert_eq!(receive(&mut socket).await.0, Arrival::Failed { to: closed, why: Reach::Port });

        peer.send_to(b"answer", from).unwrap();
        let (arrival, payload) = receive(&mut socket).await;
        assert_eq!(arrival, Arrival::Payload(peer.local_addr().unwrap()));
        assert_eq!(payload, b"answer");
    }
}

#[tokio::test]
async fn the_first_datagram_of_a_new_socket_goes_out_at_once() {
    let peer = bound("127.0.0.1:0");
    let mut socket = DatagramSocket::new(bound("127.0.0.1:0")).unwrap();
    let mut cx = Context::from_waker(std::task::Waker::noop());
    let to = peer.local_addr().unwrap();
    assert!(matches!(socket.poll_send_to(&mut cx, b"first", to, false), Poll::Ready(Ok(()))));
    assert_eq!(peer.recv_from(&mut [0; 8]).unwrap().0, 5);
}

#[tokio::test]
async fn what_does_not_fit_is_refused_at_once_and_the_mtu_is_told() {
    let mut socket = DatagramSocket::new(bound("127.0.0.1:0")).unwrap();
    let to = socket.local_addr().unwrap();
    let error = send_to(&mut socket, &[0; 65_508], to, true).await.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
    let (arrival, _) = receive(&mut socket).await;
    assert!(matches!(arrival, Arrival::Failed { to: told, why: Reach::TooBig(mtu) } if told == to && mtu > 0));
    send_to(&mut socket, b"small", to, true).await.unwrap();
    assert_eq!(receive(&mut socket).await, (Arrival::Payload(to), b"small".to_vec()));
}

sockopt_impl!(NoCheck, SetOnly, libc::SOL_SOCKET, libc::SO_NO_CHECK, bool);

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at % 251) as u8).collect()
}

async fn send_all(socket: &mut DatagramSocket, train: &[u8], size: u16, to: SocketAddr) -> Vec<usize> {
    let size = NonZeroU16::new(size).unwrap();
    let (mut done, mut steps) = (0, Vec::new());
    while done < train.len() {
        let step = poll_fn(|cx| socket.poll_send_train(cx, &train[done..], size, to, false)).await.unwrap();
        done += step;
        steps.push(step);
    }
    steps
}

fn heard(peer: &UdpSocket, count: usize) -> Vec<Vec<u8>> {
    peer.set_nonblocking(false).unwrap();
    let mut space = [0; 2048];
    (0..count).map(|_| peer.recv(&mut space).map(|length| space[..length].to_vec()).unwrap()).collect()
}

#[tokio::test]
async fn a_train_arrives_as_the_datagrams_that_it_is_made_of() {
    for local in ["127.0.0.1:0", "[::1]:0"] {
        let peer = bound(local);
        let mut socket = DatagramSocket::new(bound(local)).unwrap();
        for (size, length) in [(1200, 5 * 1200 + 17), (300, 64 * 300), (1000, 900), (10, 100 * 10 + 1)] {
            let train = pattern(length);
            let steps = send_all(&mut socket, &train, size, peer.local_addr().unwrap()).await;
            assert!(steps.iter().all(|step| step.div_ceil(usize::from(size)) <= MOST_SEGMENTS));
            let expected: Vec<_> = train.chunks(usize::from(size)).collect();
            assert_eq!(heard(&peer, expected.len()), expected);
        }
    }
}

#[tokio::test]
async fn where_the_kernel_refuses_trains_each_datagram_goes_by_itself() {
    let peer = bound("127.0.0.1:0");
    let plain = bound("127.0.0.1:0");
    // The kernel does not cut what it may not give a checksum.
    setsockopt(&plain, NoCheck, &true).unwrap();
    let mut socket = DatagramSocket::new(plain).unwrap();
    let train = pattern(3 * 500 + 1);
    assert_eq!(send_all(&mut socket, &train, 500, peer.local_addr().unwrap()).await, [500, 500, 500, 1]);
    assert_eq!(heard(&peer, 4), train.chunks(500).collect::<Vec<_>>());
    assert!(socket.train_limit < 500);
}

#[tokio::test]
async fn the_error_of_an_earlier_datagram_costs_a_train_nothing() {
    let closed = bound("127.0.0.1:0").local_addr().unwrap();
    let peer = bound("127.0.0.1:0");
    let mut socket = DatagramSocket::new(bound("127.0.0.1:0")).unwrap();
    send_to(&mut socket, b"?", closed, false).await.unwrap();
    let train = pattern(10 * 1000);
    send_all(&mut socket, &train, 1000, peer.local_addr().unwrap()).await;
    assert_eq!(heard(&peer, 10), train.chunks(1000).collect::<Vec<_>>());
    assert_eq!(receive(&mut socket).await.0, Arrival::Failed { to: closed, why: Reach::Port });
    assert_eq!(socket.train_limit, if *SENDS_TRAINS { LONGEST_TRAIN } else { 0 });
}

#[tokio::test]
async fn a_datagram_in_a_train_that_does_not_fit_is_refused_by_itself() {
    let mut socket = DatagramSocket::new(bound("127.0.0.1:0")).unwrap();
    let to = socket.local_addr().unwrap();
    let train = vec![0; 65_508 + 1];
    let size = NonZeroU16::new(65_508).unwrap();
    let error = poll_fn(|cx| socket.poll_send_train(cx, &train, size, to, true)).await.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
    assert_eq!(send_all(&mut socket, &train[65_508..], 65_508, to).await, [1]);
}

#[tokio::test]
async fn a_train_is_received_as_one_with_its_size() {
    for local in ["127.0.0.1:0", "[::1]:0"] {
        let mut sender = DatagramSocket::new(bound(local)).unwrap();
        let mut socket = DatagramSocket::new(bound(local)).unwrap();
        if !socket.receive_trains() || !*SENDS_TRAINS {
            continue;
        }
        let (from, to) = (sender.local_addr().unwrap(), socket.local_addr().unwrap());
        let train = pattern(4 * 1200 + 5);
        send_all(&mut sender, &train, 1200, to).await;
        let mut space = vec![0; 65_536];
        let mut buffer = ReadBuf::new(&mut space);
        let arrival = poll_fn(|cx| socket.poll_recv_from(cx, &mut buffer)).await.unwrap();
        assert_eq!(arrival, Arrival::Train { from, size: NonZeroU16::new(1200).unwrap() });
        assert_eq!(buffer.filled(), train);

        send_to(&mut sender, b"one", to, false).await.unwrap();
        assert_eq!(receive(&mut socket).await, (Arrival::Payload(from), b"one".to_vec()));
        send_to(&mut sender, b"", to, false).await.unwrap();
        assert_eq!(receive(&mut socket).await, (Arrival::Payload(from), Vec::new()));
    }
}

#[test]
fn the_kernels_that_spoil_trains_are_known_by_their_release() {
    for (release, bad) in [
        ("6.18.44-arch1\n", false),
        ("7.0.0-rc3", true),
        ("7.0.12", true),
        ("7.1", true),
        ("7.1.4-generic", true),
        ("7.1.5", false),
        ("7.10.1", false),
        ("17.0.1", false),
        ("", false),
    ] {
        assert_eq!(has_segmentation_bug(release), bad, "{release}");
    }
}

#[test]
fn each_code_of_an_icmp_error_stays_what_it_is() {
    let told = |origin, kind, code, errno: c_int| {
        let ee_errno = u32::try_from(errno).unwrap();
        let (ee_type, ee_code) = (kind, code);
        reach(&libc::sock_extended_err {
            ee_errno,
            ee_origin: origin,
            ee_type,
            ee_code,
            ee_pad: 0,
            ee_info: 1400,
            ee_data: 0,
        })
    };
    let v4 = |code, errno| told(libc::SO_EE_ORIGIN_ICMP, 3, code, errno);
    let v6 = |kind, code, errno| told(libc::SO_EE_ORIGIN_ICMP6, kind, code, errno);
    assert_eq!(v4(0, libc::ENETUNREACH), Some(Reach::Network));
    assert_eq!(v4(1, libc::EHOSTUNREACH), Some(Reach::Host));
    assert_eq!(v4(2, libc::ENOPROTOOPT), Some(Reach::Protocol));
    assert_eq!(v4(3, libc::ECONNREFUSED), Some(Reach::Port));
    assert_eq!(v4(4, libc::EMSGSIZE), Some(Reach::TooBig(1400)));
    assert_eq!(v4(9, libc::ENETUNREACH), Some(Reach::Coded(9)));
    assert_eq!(v4(10, libc::EHOSTUNREACH), Some(Reach::Coded(10)));
    assert_eq!(v4(13, libc::EHOSTUNREACH), Some(Reach::Prohibited));
    assert_eq!(v6(1, 0, libc::ENETUNREACH), Some(Reach::Network));
    assert_eq!(v6(1, 1, libc::EACCES), Some(Reach::Prohibited));
    assert_eq!(v6(1, 5, libc::EACCES), Some(Reach::Prohibited));
    assert_eq!(v6(4, 1, libc::EPROTO), Some(Reach::Protocol));
    assert_eq!(told(libc::SO_EE_ORIGIN_ICMP, 11, 0, libc::EHOSTUNREACH), Some(Reach::Host), "a loop on the way");
    assert_eq!(told(libc::SO_EE_ORIGIN_LOCAL, 0, 0, libc::EMSGSIZE), Some(Reach::TooBig(1400)));
    assert_eq!(told(libc::SO_EE_ORIGIN_TIMESTAMPING, 0, 0, libc::ENOMSG), None);
}
