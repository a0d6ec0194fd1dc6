//! A software TPM on two loopback ports, for programs that speak to a TPM themselves: `tss-esapi` cannot name a Unix
//! socket.

use super::{manufacture, swtpm};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::Child;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// One swtpm process with EK certificates. Gone when dropped, and with the thread that started it.
#[derive(Debug)]
pub struct NetworkTpm {
    process: Child,
    port: u16,
    ek_cas: Vec<Vec<u8>>,
    _directory: TempDir,
}

impl NetworkTpm {
    /// Manufactures a TPM with EK certificates, and starts it.
    ///
    /// # Panics
    /// There is no swtpm, or it does not start.
    #[must_use]
    pub fn start() -> Self {
        let directory = TempDir::new().expect("temporary directory");
        let ek_cas = manufacture(directory.path());
        // Somebody else may take a port between our look and swtpm's bind: look again then.
        for _ in 0..10 {
            let port = free_port_pair();
            let sockets = [port, port + 1].map(|port| format!("type=tcp,port={port},bindaddr=127.0.0.1"));
            let mut process = swtpm(directory.path(), &sockets);
            if listens(&mut process, port + 1) {
                return Self { process, port, ek_cas, _directory: directory };
            }
        }
        panic!("swtpm found no free ports");
    }

    /// How a TPM software stack reaches it.
    #[must_use]
    pub fn tcti(&self) -> String {
        format!("swtpm:host=127.0.0.1,port={}", self.port)
    }

    /// PEMs of root and issuer of its EK certificates.
    #[must_use]
    pub fn ek_cas(&self) -> &[Vec<u8>] {
        &self.ek_cas
    }
}

impl Drop for NetworkTpm {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Two neighbouring ports, as the TCTI expects.
fn free_port_pair() -> u16 {
    loop {
        let first = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = first.local_addr().expect("the port's number").port();
        if port < u16::MAX && TcpListener::bind(("127.0.0.1", port + 1)).is_ok() {
            return port;
        }
    }
}

/// Waits until the control port answers; false if swtpm ended instead.
fn listens(process: &mut Child, control: u16) -> bool {
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        if process.try_wait().expect("swtpm is looked after").is_some() {
            return false;
        }
        if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", control)) {
            // CMD_GET_CAPABILITY: the answer shows that it is swtpm who listens.
            let mut answer = [0; 4];
            let _ = stream.write_all(&1_u32.to_be_bytes());
            return stream.read(&mut answer).is_ok();
        }
        std::thread::park_timeout(Duration::from_millis(2));
    }
    false
}
