//! The demo's small internet: addresses on `lo`, sites, a nameserver and two proxies, in tasks on a thread of their own.

mod nameserver;
mod proxies;
mod sites;

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use ipnet::IpNet;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use crate::net::{Address, Host};
use crate::platform::Netlink;
use crate::platform::rootless;

/// The nameserver, as profiles/demo.yaml has it.
const NAMESERVER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 53);
/// The SOCKS5 proxy, and the address that sites see behind it.
const ABROAD: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 77);
/// The HTTP proxy, and the address that sites see behind it.
const OFFICE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 88);

const SHOP: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 10));
const SHOP6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10));
const PLAIN: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7));
const BLOCKED: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 66));
/// Where the sites are.
const SITES: [IpAddr; 4] = [SHOP, SHOP6, PLAIN, BLOCKED];

/// Every name that exists, and its addresses.
const NAMES: [(&str, &[IpAddr]); 10] = [
    ("www.shop.example", &[SHOP, SHOP6]),
    ("echo.shop.example", &[SHOP]),
    ("www.news.example", &[SHOP]),
    ("echo.news.example", &[SHOP]),
    ("wiki.office.example", &[SHOP]),
    ("films.example", &[SHOP]),
    ("ads.example", &[SHOP]),
    ("tracker.example", &[SHOP]),
    ("hidden.example", &[BLOCKED]),
    ("blog.example", &[SHOP]),
];

/// The names that the nameserver was asked for.
pub(super) type Asked = Arc<Mutex<HashSet<String>>>;

/// Gives this namespace, which must be ours, the addresses of the small internet. Returns whether it has IPv6.
///
/// # Errors
/// The kernel refuses, and what can be done about it.
pub(super) fn settle() -> anyhow::Result<bool> {
    // Some systems hand out namespaces without any right in them; the first act there shows it.
    let refused = |error| rootless::refused(io::Error::other(error));
    let mut netlink = Netlink::open().map_err(refused)?;
    netlink.link_up("lo").map_err(refused)?;
    let v6 = rootless::switch_on_ipv6();
    let servers = [NAMESERVER, ABROAD, OFFICE].map(IpAddr::V4);
    for ip in servers.into_iter().chain(SITES).filter(|ip| v6 || ip.is_ipv4()) {
        netlink.add_address("lo", IpNet::from(ip))?;
    }
    Ok(v6)
}

/// Starts everything; it lives as long as the process.
///
/// # Errors
/// A port cannot be had or a thread not be started.
pub(super) fn start(v6: bool) -> anyhow::Result<Asked> {
    let asked = Asked::default();
    let (ready, started) = std::sync::mpsc::channel();
    let questions = Arc::clone(&asked);
    std::thread::Builder::new().name("internet".into()).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let _ = ready.send(serve(v6, questions).await);
            std::future::pending::<io::Result<()>>().await
        })
    })?;
    let served = started.recv().map_err(|_| anyhow!("the small internet did not start"))?;
    served.context("the small internet did not start").map(|()| asked)
}

async fn serve(v6: bool, asked: Asked) -> io::Result<()> {
    for ip in SITES.into_iter().filter(|ip| v6 || ip.is_ipv4()) {
        sites::serve(ip).await?;
    }
    let questions = UdpSocket::bind((NAMESERVER, 53)).await?;
    tokio::spawn(nameserver::serve(questions, asked));
    let socks = TcpListener::bind((ABROAD, 1080)).await?;
    tokio::spawn(accept(socks, |stream, _| proxies::socks5(stream)));
    let http = TcpListener::bind((OFFICE, 8080)).await?;
    tokio::spawn(accept(http, |stream, _| proxies::http(stream)));
    Ok(())
}

/// Serves every connection in a task of its own.
async fn accept<F>(listener: TcpListener, serve: impl Fn(TcpStream, SocketAddr) -> F)
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    loop {
        match listener.accept().await {
            // How a connection ends is the client's to report.
            Ok((stream, from)) => drop(tokio::spawn(serve(stream, from))),
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(10)).await,
        }
    }
}

/// The addresses of `name`, if it exists.
fn addresses(name: &str) -> Option<&'static [IpAddr]> {
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, addresses)| *addresses)
}

/// Where `to` is, as the proxies know it.
fn locate(to: &Address) -> io::Result<SocketAddr> {
    let ip = match &to.host {
        Host::Ip(ip) => Some(*ip),
        Host::Name(name) => addresses(name.as_str()).and_then(|all| all.first().copied()),
    };
    ip.map(|ip| SocketAddr::new(ip, to.port)).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// How a visitor from `ip` came, in words.
fn whence(ip: IpAddr) -> &'static str {
    match ip {
        IpAddr::V4(ABROAD) => "from abroad",
        IpAddr::V4(OFFICE) => "from the office",
        _ => "straight",
    }
}
