//! The verifiers that a fleet talks to: real processes, each with a folder of its own, on one database.

use super::peers::ScriptedPeers;
use crate::command::{command, run};
use crate::error::{LabError, Result};
use assay_service::auth::Token;
use assay_service::client::ServiceClient;
use serde_json::json;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Child;

/// What verifiers of one site have in common.
#[derive(Debug, Clone)]
pub struct VerifierOptions {
    /// The `assay` binary.
    pub assay: PathBuf,
    /// Below it each verifier gets a folder.
    pub folder: PathBuf,
    /// `sqlite:` or `postgres:`; without one, SQLite in the verifier's folder.
    pub database: Option<String>,
    /// How often nodes are to attest, in seconds.
    pub interval_seconds: u64,
    /// PEM of the CA of the nodes' EK certificates.
    pub ek_ca_pem: Vec<u8>,
}

/// A verifier. Killed when dropped.
#[derive(Debug)]
pub struct VerifierProcess {
    child: Child,
    assay: PathBuf,
    folder: PathBuf,
    /// Where agents call it.
    pub(super) agent_address: SocketAddr,
    operator_url: String,
}

impl VerifierProcess {
    /// Starts the verifier `name`, with failure points as the `fail` crate writes them. `like` is another one of the same
    /// site, whose keys it is given as an operator would: by copying its state folder.
    ///
    /// # Errors
    /// It does not become ready; its last words are in the error.
    pub async fn start(
        name: &str,
        options: &VerifierOptions,
        peers: &ScriptedPeers,
        like: Option<&Self>,
        failpoints: &str,
    ) -> Result<Self> {
        let folder = options.folder.join(name);
        let state = folder.join("state");
        make(&state)?;
        let [operator, agent] = free_ports()?;
        let agent_address: SocketAddr = ([127, 0, 0, 1], agent).into();
        let agent_url = match like {
            Some(other) => {
                copy(&other.folder.join("state"), &state)?;
                other.agent_url()
            }
            None => format!("https://{agent_address}"),
        };
        let ek_ca = folder.join("ek-ca.pem");
        write(&ek_ca, &options.ek_ca_pem)?;
        let token_file = state.join("service.token");
        let peer = json!({ "url": peers.url, "ca_file": peers.ca_file, "token_file": token_file });
        let silence_seconds = (options.interval_seconds * 3).max(10);
        let mut verifier = json!({ "name": name, "listen": format!("127.0.0.1:{operator}"), "agent_listen": agent_address,
            "agent_url": agent_url, "ek_ca_files": [ek_ca], "isolation": peer, "imaging": peer,
            "attestation_interval_seconds": options.interval_seconds, "attestation_silence_seconds": silence_seconds });
        if let Some(database) = &options.database {
            verifier["database"] = json!(database);
        }
        let file = json!({ "site": { "state_dir": state }, "verifier": verifier });
        let file = toml::to_string(&file).map_err(LabError::service("writing the verifier's configuration"))?;
        write(&folder.join(CONFIG), file.as_bytes())?;
        let child = spawn(&options.assay, &folder, failpoints)?;
        let assay = options.assay.clone();
        let operator_url = format!("https://127.0.0.1:{operator}/");
        let mut process = Self { child, assay, folder, agent_address, operator_url };
        process.ready().await?;
        Ok(process)
    }

    /// Starts it again after its end, as its supervisor would: the same folder, name and addresses.
    ///
    /// # Errors
    /// It still runs, or does not become ready.
    pub async fn start_again(&mut self, failpoints: &str) -> Result<()> {
        if self.child.try_wait().map_err(LabError::io("looking after the verifier"))?.is_none() {
            return Err(LabError::unexpected("starting the verifier again", "it still runs"));
        }
        self.child = spawn(&self.assay, &self.folder, failpoints)?;
        self.ready().await
    }

    async fn ready(&mut self) -> Result<()> {
        let log = self.folder.join(LOG);
        let said = || fs::read_to_string(&log).unwrap_or_default();
        let deadline = tokio::time::Instant::now() + START_LIMIT;
        loop {
            let ended = self.child.try_wait().map_err(LabError::io("looking after the verifier"))?.is_some();
            let (words, late) = (said(), tokio::time::Instant::now() >= deadline);
            if words.contains("verifier.ready") && !ended {
                return Ok(());
            }
            if ended || late {
                return Err(LabError::unexpected("starting the verifier", crate::command::tail(words.trim())));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Its process, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Kills it as a power cut would.
    ///
    /// # Errors
    /// It was gone already.
    pub async fn kill(&mut self) -> Result<()> {
        self.child.kill().await.map_err(LabError::io("killing the verifier"))
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// It does not.
    pub async fn ended(&mut self) -> Result<()> {
        let ended = tokio::time::timeout(START_LIMIT, self.child.wait()).await;
        match ended {
            Ok(status) => status.map(drop).map_err(LabError::io("waiting for the verifier to end")),
            Err(_elapsed) => Err(LabError::unexpected("waiting for the verifier to end", "it still runs")),
        }
    }

    /// The URL that agents are told, which is the same for all verifiers of the site.
    fn agent_url(&self) -> String {
        let file = fs::read_to_string(self.folder.join(CONFIG)).unwrap_or_default();
        let file: toml::Table = file.parse().unwrap_or_default();
        let url = file.get("verifier").and_then(|table| table.get("agent_url")).and_then(toml::Value::as_str);
        url.unwrap_or_default().to_owned()
    }

    /// PEM of the CA of its certificates.
    ///
    /// # Errors
    /// It is not there.
    pub(super) fn ca_pem(&self) -> Result<String> {
        let path = self.folder.join("state/tls/ca.pem");
        fs::read_to_string(&path).map_err(LabError::io(format!("reading {}", path.display())))
    }

    /// A client with the operator's token.
    ///
    /// # Errors
    /// The token or the CA is not there.
    pub fn operator(&self) -> Result<ServiceClient> {
        let doing = "making a client of the verifier";
        let path = self.folder.join("state/operator.token");
        let token = fs::read_to_string(&path).map_err(LabError::io(format!("reading {}", path.display())))?;
        let url = self.operator_url.parse().map_err(LabError::service(doing))?;
        ServiceClient::new(url, &self.ca_pem()?, Token::from_text(&token)).map_err(LabError::service(doing))
    }

    /// Runs the real client.
    ///
    /// # Errors
    /// It fails; its words are in the error.
    pub(super) async fn client(&self, arguments: &[&str]) -> Result<String> {
        let mut client = command(&self.assay);
        client.args(arguments).arg("--site").arg(self.folder.join("state"));
        run(client, &format!("assay {}", arguments.join(" ")), START_LIMIT).await
    }
}

/// Starts what is configured in `folder`. Its log begins anew.
fn spawn(assay: &Path, folder: &Path, failpoints: &str) -> Result<Child> {
    let log_path = folder.join(LOG);
    let log = fs::File::create(&log_path).map_err(LabError::io(format!("making {}", log_path.display())))?;
    let errors = log.try_clone().map_err(LabError::io("opening the verifier's log twice"))?;
    let mut serve = command(assay);
    serve.args(["verifier", "serve", "--config"]).arg(folder.join(CONFIG)).env("FAILPOINTS", failpoints);
    serve.stdout(Stdio::from(log)).stderr(Stdio::from(errors));
    serve.spawn().map_err(LabError::io(format!("starting {}", assay.display())))
}

/// Ports that were free a moment ago.
fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let mut ports = [0; N];
    let mut held = Vec::new();
    for port in &mut ports {
        let listener = TcpListener::bind("127.0.0.1:0").map_err(LabError::io("looking for a free port"))?;
        *port = listener.local_addr().map_err(LabError::io("looking for a free port"))?.port();
        held.push(listener);
    }
    Ok(ports)
}

fn make(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(LabError::io(format!("making {}", folder.display())))
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    fs::write(path, content).map_err(LabError::io(format!("writing {}", path.display())))
}

/// Keys and tokens; a database in there is the other's own.
fn copy(from: &Path, to: &Path) -> Result<()> {
    make(to)?;
    let entries = fs::read_dir(from).map_err(LabError::io(format!("reading {}", from.display())))?;
    for entry in entries.flatten() {
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy(&path, &target)?;
        } else if !path.to_string_lossy().contains(".db") {
            fs::copy(&path, &target).map_err(LabError::io(format!("copying {}", path.display())))?;
        }
    }
    Ok(())
}

const CONFIG: &str = "site.toml";
const LOG: &str = "verifier.log";
const LOOK_EVERY: Duration = Duration::from_millis(20);
const START_LIMIT: Duration = Duration::from_secs(60);
