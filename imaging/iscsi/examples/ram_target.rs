//! Serves a disk in memory on the loopback interface, to try initiators against the engine by hand:
//! `cargo run -p assay-iscsi --example ram_target [port [initiator [user:secret]]]`.

#[path = "../tests/support/mod.rs"]
mod support;

use assay_iscsi::{Authentication, ChapAlgorithms, ChapCredentials, SessionLimit};
use support::{Server, config};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let port = arguments.next().map_or(0, |port| port.parse().expect("a port number"));
    let initiator = arguments.next();
    let authentication = match arguments.next().as_deref().and_then(|chap| chap.split_once(':')) {
        Some((name, secret)) => Authentication::Chap {
            initiator: ChapCredentials::new(name, secret),
            target: None,
            algorithms: ChapAlgorithms::WithMd5,
        },
        None => Authentication::None,
    };
    let mut config = config(256 * 2048, authentication);
    if let Some(initiator) = initiator {
        config.initiator = initiator;
    }
    let target = config.name.clone();
    let server = Server::start(port, config, SessionLimit::Many(8));
    eprintln!("iscsi://{}/{target}/0", server.address());
    server.wait();
}
