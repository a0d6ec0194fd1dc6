//! The server on loopback, against curl's TFTP client and against sockets that misbehave.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

use assay_tftp::server::Report;
use assay_tftp::socket::Listener;
use assay_tftp::transfer::Outcome;
use assay_tftp::{Files, Limits, ListenConfig};
use bytes::Bytes;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

struct Lent {
    content: Bytes,
    reports: mpsc::UnboundedSender<Report>,
}

impl Files for Lent {
    fn open(&self, _peer: IpAddr, name: &str) -> Option<Bytes> {
        match name {
            "snponly.efi" => Some(self.content.clone()),
            "panic" => panic!("injected"),
            _ => None,
        }
    }

    fn ended(&self, report: &Report) {
        assert!(report.name != "bad-report");
        let _ = self.reports.send(report.clone());
    }
}

struct Site {
    address: SocketAddr,
    reports: mpsc::UnboundedReceiver<Report>,
    content: Bytes,
    _shutdown: DropGuard,
}

/// A server on a free port of loopback, lending `bytes` octets as `snponly.efi`.
fn start(bytes: usize, offload: bool) -> Site {
    let content: Bytes = (0..bytes).map(|index| u8::try_from(index % 253).unwrap()).collect::<Vec<_>>().into();
    let (sender, reports) = mpsc::unbounded_channel();
    let config = ListenConfig {
        address: "127.0.0.1:0".parse().unwrap(),
        interface: None,
        limits: Limits::default(),
        segmentation_offload: offload,
    };
    let listener = Listener::bind(config).unwrap();
    let address = listener.address();
    let shutdown = CancellationToken::new();
    let files = Arc::new(Lent { content: content.clone(), reports: sender });
    tokio::spawn(listener.serve(files, shutdown.clone()));
    Site { address, reports, content, _shutdown: shutdown.drop_guard() }
}

async fn curl(site: &Site, name: &str, arguments: &[&str]) -> std::process::Output {
    let url = format!("tftp://{}/{name}", site.address);
    let mut command = tokio::process::Command::new("curl");
    command.args(["--silent", "--show-error", "--max-time", "20"]).args(arguments).arg(url);
    command.output().await.expect("curl runs")
}

#[tokio::test]
async fn curl_reads_the_file_with_and_without_options() {
    for (size, arguments) in [
        (173_792, ["--tftp-blksize", "1468"].as_slice()),
        (173_792, &["--tftp-no-options"]),
        (512 * 40, &["--tftp-blksize", "512"]),
        // Not 0: curl 7.88 fails at an empty file before it has acknowledged it.
        (1, &["--tftp-blksize", "512"]),
    ] {
        let mut site = start(size, false);
        let output = curl(&site, "snponly.efi", arguments).await;
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stdout == site.content, "{arguments:?}: {} octets differ", output.stdout.len());
        let report = site.reports.recv().await.unwrap();
        assert_eq!((report.outcome, report.name.as_str()), (Outcome::Complete, "snponly.efi"));
    }
}

#[tokio::test]
async fn row_5_curl_is_told_nothing_of_other_files() {
    let site = start(10, false);
    for name in ["autoexec.ipxe", "%2e%2e/etc/passwd", "etc/passwd"] {
        let output = curl(&site, name, &[]).await;
        assert_eq!(output.status.code(), Some(68), "curl's code for TFTP's file not found");
        assert!(output.stdout.is_empty());
    }
}

/// A client of RFC 7440 on a plain socket: acknowledges whole windows.
async fn read_windowed(site: &Site, window: usize) -> Vec<u8> {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let request = format!("\0\u{1}snponly.efi\0octet\0blksize\x001468\0windowsize\0{window}\0");
    socket.send_to(request.as_bytes(), site.address).await.unwrap();
    let mut buffer = [0; 2048];
    let (length, server) = socket.recv_from(&mut buffer).await.unwrap();
    assert_ne!(server, site.address, "a transfer has a port of its own");
    assert_eq!(&buffer[..length], format!("\0\u{6}blksize\x001468\0windowsize\0{window}\0").as_bytes());
    socket.connect(server).await.unwrap();
    socket.send(b"\0\x04\0\0").await.unwrap();
    let (mut content, mut blocks) = (Vec::new(), 0_usize);
    loop {
        let length = socket.recv(&mut buffer).await.unwrap();
        blocks += 1;
        assert_eq!(buffer[..4], [0, 3, (blocks >> 8) as u8, blocks as u8]);
        content.extend_from_slice(&buffer[4..length]);
        let last = length < 1472;
        if last || blocks.is_multiple_of(window) {
            socket.send(&[0, 4, (blocks >> 8) as u8, blocks as u8]).await.unwrap();
        }
        if last {
            return content;
        }
    }
}

#[tokio::test]
async fn windows_arrive_whole_with_and_without_segmentation_offload() {
    for offload in [false, true] {
        let site = start(1_000_000, offload);
        for window in [4, 16, 64] {
            let read = tokio::time::timeout(Duration::from_secs(20), read_windowed(&site, window));
            assert!(read.await.expect("the transfer ends") == site.content, "offload {offload}, window {window}");
        }
    }
}

#[tokio::test]
async fn size_then_file_from_one_port_as_ovmf_does() {
    let mut site = start(5000, false);
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut buffer = [0; 2048];
    socket.send_to(b"\0\x01snponly.efi\0octet\0tsize\x000\0blksize\x001468\0", site.address).await.unwrap();
    let (length, first) = socket.recv_from(&mut buffer).await.unwrap();
    assert_eq!(&buffer[..length], b"\0\x06tsize\x005000\0blksize\x001468\0");
    socket.send_to(b"\0\x05\0\x08\0", first).await.unwrap();
    socket.send_to(b"\0\x01snponly.efi\0octet\0blksize\x001468\0", site.address).await.unwrap();
    let (length, second) = socket.recv_from(&mut buffer).await.unwrap();
    assert_eq!(&buffer[..length], b"\0\x06blksize\x001468\0");
    // The second may have begun before the first was seen to end; the first then ends without a report.
    assert_ne!(first, second);
    socket.send_to(b"\0\x05\0\x00\0", second).await.unwrap();
    loop {
        let report = tokio::time::timeout(Duration::from_secs(10), site.reports.recv()).await.unwrap().unwrap();
        if report.outcome == (Outcome::Refused { code: 0 }) {
            break;
        }
        assert_eq!(report.outcome, Outcome::Refused { code: 8 });
    }
}

#[tokio::test]
async fn row_3_another_port_cannot_touch_a_transfer() {
    let mut site = start(5000, false);
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let stranger = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut buffer = [0; 2048];
    client.send_to(b"\0\x01snponly.efi\0octet\0", site.address).await.unwrap();
    let (_, server) = client.recv_from(&mut buffer).await.unwrap();
    stranger.send_to(b"\0\x05\0\0\0", server).await.unwrap();
    for block in 1..=10_u8 {
        client.send_to(&[0, 4, 0, block], server).await.unwrap();
        if block < 10 {
            let (length, _) = client.recv_from(&mut buffer).await.unwrap();
            assert_eq!(buffer[..4], [0, 3, 0, block + 1]);
            assert!(length > 4);
        }
    }
    assert_eq!(site.reports.recv().await.unwrap().outcome, Outcome::Complete);
}
