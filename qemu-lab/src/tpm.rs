//! Software TPMs: a certificate authority of the lab's own, and one swtpm a node with an EK certificate from it.

use crate::command::{command, run, wait_for_path, wait_until};
use crate::error::{LabError, Result};
use crate::netns::Netns;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::process::Child;

/// The authority that stands for the TPM's manufacturer.
#[derive(Debug, Clone)]
pub struct TpmAuthority {
    folder: PathBuf,
}

/// A TPM's state: what survives power cycles.
#[derive(Debug, Clone)]
pub struct TpmState {
    folder: PathBuf,
}

/// A TPM with power. Dropping it cuts the power.
#[derive(Debug)]
pub struct RunningTpm {
    _process: Child,
    /// QEMU's control channel.
    pub control_socket: PathBuf,
}

impl TpmAuthority {
    /// Prepares an authority in `folder`; `swtpm_localca` makes its keys when it first certifies.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn create(folder: &Path) -> Result<Self> {
        let state = folder.join("state");
        std::fs::create_dir_all(&state).map_err(LabError::io(format!("making {}", state.display())))?;
        let write = |name: &str, text: String| {
            let path = folder.join(name);
            std::fs::write(&path, text).map_err(LabError::io(format!("writing {}", path.display())))
        };
        let state = state.display();
        write(
            LOCALCA_CONF,
            format!(
                "statedir = {state}\nsigningkey = {state}/signkey.pem\nissuercert = {state}/issuercert.pem\n\
                 certserial = {state}/certserial\n"
            ),
        )?;
        write(
            LOCALCA_OPTIONS,
            "--platform-manufacturer Assay\n--platform-version 1\n--platform-model qemu-lab\n".to_owned(),
        )?;
        write(
            SETUP_CONF,
            format!(
                "create_certs_tool = /usr/bin/swtpm_localca\ncreate_certs_tool_config = {}\n\
                 create_certs_tool_options = {}\nactive_pcr_banks = sha256\n",
                folder.join(LOCALCA_CONF).display(),
                folder.join(LOCALCA_OPTIONS).display()
            ),
        )?;
        Ok(Self { folder: folder.to_owned() })
    }

    /// Makes a TPM with an EK and its certificate, or takes the one that `folder` holds.
    ///
    /// # Errors
    /// `swtpm_setup` fails.
    pub async fn manufacture(&self, folder: &Path) -> Result<TpmState> {
        let made = folder.join(MADE);
        if !made.exists() {
            std::fs::create_dir_all(folder).map_err(LabError::io(format!("making {}", folder.display())))?;
            let mut setup = command("swtpm_setup");
            setup.args(["--tpm2", "--create-ek-cert", "--create-platform-cert", "--pcr-banks", "sha256"]);
            setup.arg("--overwrite").arg("--tpmstate").arg(folder).arg("--config").arg(self.folder.join(SETUP_CONF));
            run(setup, &format!("manufacturing the TPM in {}", folder.display()), SETUP_LIMIT).await?;
            std::fs::write(&made, "").map_err(LabError::io(format!("writing {}", made.display())))?;
        }
        Ok(TpmState { folder: folder.to_owned() })
    }

    /// PEM files of the certificates that EK certificates chain to: root first, then issuer.
    #[must_use]
    pub fn ca_files(&self) -> Vec<PathBuf> {
        let state = self.folder.join("state");
        vec![state.join("swtpm-localca-rootca-cert.pem"), state.join("issuercert.pem")]
    }
}

impl TpmState {
    /// Gives the TPM power, for QEMU to drive.
    ///
    /// # Errors
    /// swtpm does not start.
    pub async fn power_on(&self) -> Result<RunningTpm> {
        let control_socket = self.folder.join("control.sock");
        // A killed predecessor leaves its socket behind, which would look like a TPM that is ready.
        let _was_there = std::fs::remove_file(&control_socket);
        let mut swtpm = command("swtpm");
        swtpm.args(["socket", "--tpm2", "--terminate", "--tpmstate"]).arg(format!("dir={}", self.folder.display()));
        swtpm.arg("--ctrl").arg(format!("type=unixio,path={}", control_socket.display()));
        swtpm.arg("--log").arg(format!("file={},level=1", self.folder.join("swtpm.log").display()));
        let process = swtpm.spawn().map_err(LabError::io("starting swtpm"))?;
        wait_for_path(&control_socket, "waiting for swtpm's control socket", START_LIMIT).await?;
        Ok(RunningTpm { _process: process, control_socket })
    }

    /// Gives the TPM power in `netns`, for a TPM software stack: on `port` of loopback, and its control channel on the
    /// port after it. Answers the TCTI.
    ///
    /// # Errors
    /// swtpm does not start.
    pub async fn power_on_for_software(&self, netns: &Netns, port: u16) -> Result<(RunningTpm, String)> {
        let control_socket = self.folder.join("unused.sock");
        let mut swtpm = netns.command("swtpm");
        swtpm.args(["socket", "--tpm2", "--flags", "startup-clear", "--tpmstate"]);
        swtpm.arg(format!("dir={}", self.folder.display()));
        let control_port = port.saturating_add(1);
        swtpm.arg("--server").arg(format!("type=tcp,port={port}"));
        swtpm.arg("--ctrl").arg(format!("type=tcp,port={control_port}"));
        swtpm.stderr(Stdio::null());
        let process = swtpm.spawn().map_err(LabError::io("starting swtpm"))?;
        let listening = move || async move {
            for port in [port, control_port] {
                // swtpm does not mind callers who say nothing.
                let call = || async { TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.ok() };
                drop(wait_until("waiting for swtpm to accept connections", START_LIMIT, call).await?);
            }
            Ok(())
        };
        netns.act(START_LIMIT * 3, listening).await?;
        Ok((RunningTpm { _process: process, control_socket }, format!("swtpm:host=127.0.0.1,port={port}")))
    }
}

const LOCALCA_CONF: &str = "swtpm-localca.conf";
const LOCALCA_OPTIONS: &str = "swtpm-localca.options";
const SETUP_CONF: &str = "swtpm_setup.conf";
const MADE: &str = "manufactured";
const SETUP_LIMIT: Duration = Duration::from_secs(60);
const START_LIMIT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    fn two_free_ports() -> u16 {
        let bind = |port| std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port));
        loop {
            let first = bind(0).unwrap();
            let port = first.local_addr().unwrap().port();
            if port < u16::MAX && bind(port + 1).is_ok() {
                return port;
            }
        }
    }

    #[tokio::test]
    async fn a_tpm_gets_an_ek_certificate_from_the_labs_own_authority() {
        let folder = tempfile::tempdir().unwrap();
        let authority = TpmAuthority::create(&folder.path().join("ca")).unwrap();
        let tpm = authority.manufacture(&folder.path().join("n1")).await.unwrap();
        for file in authority.ca_files() {
            let pem = std::fs::read_to_string(&file).unwrap();
            assert!(pem.contains("BEGIN CERTIFICATE"), "{}: {pem}", file.display());
        }
        let (_running, tcti) = tpm.power_on_for_software(&Netns::Site, two_free_ports()).await.unwrap();
        let mut read = command("tpm2_nvread");
        read.args(["-T", &tcti, "0x1c00002", "-o"]).arg(folder.path().join("ek.der"));
        run(read, "reading the EK certificate", START_LIMIT).await.unwrap();
        let der = std::fs::read(folder.path().join("ek.der")).unwrap();
        assert_eq!(der.first(), Some(&0x30), "not a DER sequence");
    }
}
