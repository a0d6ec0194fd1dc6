//! The node's NICs: finding them, bringing them up, giving them an address. The edge to the kernel's rtnetlink and
//! `/sys/class/net`.

use assay_wire::net::MacAddr;
use futures_util::TryStreamExt as _;
use ipnet::Ipv4Net;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;

/// Where the kernel lists network devices.
const SYS_CLASS_NET: &str = "/sys/class/net";

/// `ARPHRD_ETHER`: the kernel's number for Ethernet in `/sys/class/net/*/type`.
const ETHERNET: &str = "1";

/// An Ethernet NIC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// The kernel's name for it.
    pub name: String,
    /// Its address.
    pub mac: MacAddr,
}

impl Nic {
    /// The NIC of this name.
    ///
    /// # Errors
    /// If there is none, or it is not Ethernet.
    pub fn find(name: &str) -> Result<Self, NetworkError> {
        read_nic(&Path::new(SYS_CLASS_NET).join(name), name)
            .ok_or_else(|| NetworkError::NoSuchNic { nic: name.to_owned() })
    }

    /// All Ethernet NICs with hardware behind them, by name.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn all() -> Result<Vec<Self>, NetworkError> {
        let list = |source| NetworkError::List { source };
        let mut nics = Vec::new();
        for entry in fs::read_dir(SYS_CLASS_NET).map_err(list)? {
            let entry = entry.map_err(list)?;
            let path = entry.path();
            if path.join("device").exists() {
                nics.extend(read_nic(&path, &entry.file_name().to_string_lossy()));
            }
        }
        nics.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(nics)
    }
}

fn read_nic(path: &Path, name: &str) -> Option<Nic> {
    let read = |file: &str| fs::read_to_string(path.join(file)).ok();
    let mac = read("address")?.trim().parse().ok()?;
    (read("type")?.trim() == ETHERNET).then(|| Nic { name: name.to_owned(), mac })
}

/// The way to the kernel's network configuration.
#[derive(Clone)]
pub struct Network {
    handle: Handle,
}

impl Network {
    /// Opens it. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If the kernel refuses the socket.
    pub fn open() -> Result<Self, NetworkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(|source| NetworkError::List { source })?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// Brings a link up.
    ///
    /// # Errors
    /// If it is gone or the kernel refuses.
    pub async fn up(&self, nic: &str) -> Result<(), NetworkError> {
        let failed = refused(nic, "bringing the link up");
        let index = self.index(nic).await?;
        self.handle.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await.map_err(failed)
    }

    /// Makes `address` the one IPv4 address of `nic`, and `router` the default route. Whatever was there before goes,
    /// also connections' routes: after a move, nothing of the old network may be used by mistake.
    ///
    /// # Errors
    /// If the NIC is gone or the kernel refuses.
    pub async fn set_address(&self, nic: &str, address: Ipv4Net, router: Option<Ipv4Addr>) -> Result<(), NetworkError> {
        let index = self.index(nic).await?;
        ask_neighbours_often(nic);
        let failed = refused(nic, "removing its address");
        let old: Vec<_> =
            self.handle.address().get().set_link_index_filter(index).execute().try_collect().await.map_err(&failed)?;
        for message in old.into_iter().filter(|message| message.header.family == AddressFamily::Inet) {
            self.handle.address().del(message).execute().await.map_err(&failed)?;
        }
        self.handle
            .address()
            .add(index, address.addr().into(), address.prefix_len())
            .execute()
            .await
            .map_err(refused(nic, "setting its address"))?;
        if let Some(router) = router {
            let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(router).output_interface(index).build();
            let failed = refused(nic, "setting the default route");
            self.handle.route().add(route).replace().execute().await.map_err(failed)?;
        }
        Ok(())
    }

    async fn index(&self, nic: &str) -> Result<u32, NetworkError> {
        let mut links = self.handle.link().get().match_name(nic.to_owned()).execute();
        let link = links.try_next().await.map_err(refused(nic, "looking it up"))?;
        Ok(link.ok_or_else(|| NetworkError::NoSuchNic { nic: nic.to_owned() })?.header.index)
    }
}

/// Has the kernel repeat an ARP request that nobody answers after a tenth of a second, and not after one: just after a
/// port has moved the first is often lost, and every connection waits for it. Only ever a matter of time, so a kernel
/// that does not let us is none of anybody's business.
pub fn ask_neighbours_often(nic: &str) {
    let path = format!("/proc/sys/net/ipv4/neigh/{nic}/retrans_time_ms");
    if let Err(error) = std::fs::write(&path, "100") {
        tracing::debug!(event = "agent.slow_neighbours", "writing {path}: {error}");
    }
    // As often as before gives up after as long as before.
    let _same = std::fs::write(format!("/proc/sys/net/ipv4/neigh/{nic}/mcast_solicit"), "30");
}

/// What the kernel would not do.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// No list.
    #[error("listing the network devices")]
    List {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No such NIC.
    #[error("there is no Ethernet device `{nic}`")]
    NoSuchNic {
        /// Its name.
        nic: String,
    },
    /// A request was refused.
    #[error("configuring {nic}: {doing}")]
    Refused {
        /// The NIC.
        nic: String,
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        #[source]
        source: Box<rtnetlink::Error>,
    },
}

fn refused<'a>(nic: &'a str, doing: &'static str) -> impl Fn(rtnetlink::Error) -> NetworkError + use<'a> {
    move |source| NetworkError::Refused { nic: nic.to_owned(), doing, source: Box::new(source) }
}
