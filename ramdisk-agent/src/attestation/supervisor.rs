//! The word to systemd (`sd_notify(3)`): a datagram to the socket that it named, and nothing where there is none.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Whoever started this program and wants to know how it does.
#[derive(Debug)]
pub struct Supervisor {
    address: Option<SocketAddr>,
}

impl Supervisor {
    /// The one that the environment names, if any.
    #[must_use]
    pub fn from_environment() -> Self {
        Self { address: std::env::var("NOTIFY_SOCKET").ok().and_then(|name| address(&name)) }
    }

    /// The agent does what it is for.
    pub fn ready(&self) {
        self.tell("READY=1");
    }

    /// What `systemctl status` shows.
    pub fn status(&self, words: &str) {
        self.tell(&format!("STATUS={words}"));
    }

    fn tell(&self, message: &str) {
        let Some(address) = &self.address else { return };
        let told = UnixDatagram::unbound().and_then(|socket| socket.send_to_addr(message.as_bytes(), address));
        if let Err(error) = told {
            tracing::warn!(event = "agent.unheard", "telling systemd {message}: {error}");
        }
    }
}

/// `@` stands for the zero octet of an abstract address.
fn address(name: &str) -> Option<SocketAddr> {
    match name.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name).ok(),
        None => SocketAddr::from_pathname(name).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systemd_hears_what_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let supervisor = Supervisor { address: address(&path.display().to_string()) };
        supervisor.ready();
        supervisor.status("renewed 1 times");
        let mut heard = [0; 64];
        let length = socket.recv(&mut heard).unwrap();
        assert_eq!(&heard[..length], b"READY=1");
        let length = socket.recv(&mut heard).unwrap();
        assert_eq!(&heard[..length], b"STATUS=renewed 1 times");
        assert!(address("@assay").is_some_and(|address| address.as_abstract_name() == Some(b"assay")));
        // Nobody listening is no trouble.
        Supervisor { address: None }.ready();
    }
}
