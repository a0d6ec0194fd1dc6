//! Real parts for the agent's tests: a software TPM, and a verifier's side of the conversation that is as strict as a
//! test needs, over real TLS.

#![allow(dead_code, reason = "each test uses its part")]

pub(crate) mod tsm;

use assay_ramdisk_agent::pin::KeyPin;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsAcceptor;

/// A swtpm on two loopback ports; gone when dropped. (`tss-esapi` cannot name a Unix socket.)
pub(crate) struct SoftTpm {
    process: Child,
    port: u16,
    _state: TempDir,
}

impl SoftTpm {
    /// Manufactures a TPM with an EK certificate, and starts it.
    pub(crate) fn start() -> Self {
        let state = tempfile::tempdir().unwrap();
        let ca = state.path().join("ca");
        std::fs::create_dir(&ca).unwrap();
        let write = |name: &str, text: String| {
            let path = state.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let ca_config = write(
            "ca.conf",
            format!(
                "statedir = {0}\nsigningkey = {0}/key.pem\nissuercert = {0}/cert.pem\ncertserial = {0}/serial\n",
                ca.display()
            ),
        );
        let options =
            write("ca.options", "--platform-manufacturer A\n--platform-version 1\n--platform-model m\n".to_owned());
        let setup = write(
            "setup.conf",
            format!(
                "create_certs_tool = /usr/bin/swtpm_localca\ncreate_certs_tool_config = {ca_config}\ncreate_certs_tool_options = {options}\n"
            ),
        );
        let made = Command::new("swtpm_setup")
            .args(["--tpm2", "--create-ek-cert", "--pcr-banks", "sha256", "--overwrite", "--config", &setup])
            .arg("--tpmstate")
            .arg(state.path())
            .output()
            .expect("swtpm_setup runs (Debian package swtpm-tools)");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stdout));
        // Somebody else may take a port between our look and swtpm's bind: look again then.
        for _ in 0..10 {
            let port = free_port_pair();
            let mut process = Command::new("swtpm")
                .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear"])
                .arg("--tpmstate")
                .arg(format!("dir={}", state.path().display()))
                .arg("--server")
                .arg(format!("type=tcp,port={port},bindaddr=127.0.0.1"))
                .arg("--ctrl")
                .arg(format!("type=tcp,port={},bindaddr=127.0.0.1", port + 1))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("swtpm starts");
            if listens(&mut process, port + 1) {
                return Self { process, port, _state: state };
            }
        }
        panic!("swtpm found no free ports");
    }

    /// How the agent reaches it.
    pub(crate) fn tcti(&self) -> String {
        format!("swtpm:host=127.0.0.1,port={}", self.port)
    }
}

impl Drop for SoftTpm {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Two neighbouring ports, as the TCTI expects.
fn free_port_pair() -> u16 {
    loop {
        let first = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = first.local_addr().unwrap().port();
        if port < u16::MAX && TcpListener::bind(("127.0.0.1", port + 1)).is_ok() {
            return port;
        }
    }
}

/// Waits until the control port answers; false if swtpm ended instead.
fn listens(process: &mut Child, control: u16) -> bool {
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        if process.try_wait().unwrap().is_some() {
            return false;
        }
        if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", control)) {
            // CMD_GET_CAPABILITY: the answer shows that it is swtpm who listens.
            let mut answer = [0; 4];
            let _ = stream.write_all(&1_u32.to_be_bytes());
            return stream.read(&mut answer).is_ok();
        }
        std::thread::yield_now();
    }
    false
}

/// One request as the server saw it.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) bearer: Option<String>,
    pub(crate) body: Vec<u8>,
}

/// A TLS server that answers each request with `status` and JSON that a closure decides. Gone with its task.
pub(crate) struct TlsServer {
    pub(crate) address: SocketAddr,
    pub(crate) pin: KeyPin,
}

impl TlsServer {
    /// Starts it on a loopback port, with a fresh key.
    pub(crate) async fn start(mut answer: impl FnMut(Seen) -> (u16, Vec<u8>) + Send + 'static) -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate =
            rcgen::CertificateParams::new(vec!["verifier".to_owned()]).unwrap().self_signed(&key).unwrap();
        let pin = KeyPin::of(&rcgen::PublicKeyData::subject_public_key_info(&key));
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                rustls_pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                // A client that refuses our key ends the handshake.
                let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                let Some(seen) = read_request(&mut stream).await else { continue };
                let (status, body) = answer(seen);
                let head =
                    format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
                let _ = stream.write_all(&[head.as_bytes(), &body].concat()).await;
                let _ = stream.shutdown().await;
            }
        });
        Self { address, pin }
    }
}

async fn read_request(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Option<Seen> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).ok()?;
    let header = |name: &str| {
        head.lines().find_map(|line| {
            let (found, value) = line.split_once(": ")?;
            found.eq_ignore_ascii_case(name).then(|| value.to_owned())
        })
    };
    let mut body = vec![0; header("content-length").and_then(|n| n.parse().ok()).unwrap_or(0)];
    stream.read_exact(&mut body).await.ok()?;
    let mut first = head.split(' ');
    Some(Seen {
        method: first.next()?.to_owned(),
        path: first.next()?.to_owned(),
        bearer: header("authorization").and_then(|value| value.strip_prefix("Bearer ").map(str::to_owned)),
        body,
    })
}
