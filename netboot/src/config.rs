//! netboot's configuration: the file as people write it, and what the service runs on once it has been checked.

use crate::dhcp::lease::Scope;
use crate::script::CommandLine;
use assay_service::config::ConfigError;
use assay_wire::id::NodeId;
use assay_wire::net::MacAddr;
use ipnet::Ipv4Net;
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use url::Url;

/// What the service runs on.
#[derive(Debug, Clone)]
pub struct Config {
    /// Networks that nodes boot from.
    pub interfaces: Vec<Interface>,
    /// What firmware loads: iPXE as one EFI application.
    pub firmware_loader: PathBuf,
    /// Agent images by name.
    pub ramdisks: BTreeMap<String, Ramdisk>,
    /// The one that a node boots unless said otherwise; a key of `ramdisks`.
    pub default_ramdisk: String,
    /// Nodes that boot another one; values are keys of `ramdisks`.
    pub node_ramdisks: HashMap<NodeId, String>,
    /// The verifier's agent API, as agents are told.
    pub verifier_url: Url,
    /// SHA-256 of the verifier's TLS key, hexadecimal, as agents are told.
    pub verifier_key_sha256: String,
    /// Where leases are recorded.
    pub lease_log: PathBuf,
    /// How long a boot URL is good for.
    pub token_lifetime: Duration,
}

/// One network that nodes boot from.
#[derive(Debug, Clone)]
pub struct Interface {
    /// The network interface's name.
    pub name: String,
    /// Its addresses.
    pub scope: Scope,
    /// Relays whose packets are answered.
    pub relays: Vec<Ipv4Addr>,
    /// Fixed addresses.
    pub reservations: HashMap<MacAddr, Ipv4Addr>,
    /// Port of the boot files' HTTP server.
    pub http_port: u16,
    /// Let the kernel cut TFTP windows into datagrams.
    pub segmentation_offload: bool,
}

/// An agent image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ramdisk {
    /// The UKI.
    pub path: PathBuf,
    /// The command line that its Reference Values were computed for.
    pub command_line: CommandLine,
}

/// What the rest of the site knows, for fields that the file leaves out.
#[derive(Debug, Clone, Copy)]
pub struct SiteDefaults<'a> {
    /// Folder of netboot's own state.
    pub state_dir: &'a Path,
    /// SHA-256 of the TLS key of the verifier in the same process.
    pub verifier_key_sha256: Option<&'a str>,
}

/// The `[netboot]` section, as written.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    interfaces: Vec<InterfaceFile>,
    #[serde(default = "default_loader")]
    firmware_loader: PathBuf,
    ramdisks: Vec<RamdiskFile>,
    default_ramdisk: String,
    #[serde(default)]
    node_ramdisks: HashMap<NodeId, String>,
    verifier_url: Url,
    verifier_key_sha256: Option<String>,
    lease_log: Option<PathBuf>,
    #[serde(default = "default_token_minutes")]
    token_minutes: u64,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct InterfaceFile {
    name: String,
    server: Ipv4Addr,
    network: Ipv4Net,
    pool_first: Option<Ipv4Addr>,
    pool_last: Option<Ipv4Addr>,
    router: Option<Ipv4Addr>,
    #[serde(default)]
    relays: Vec<Ipv4Addr>,
    #[serde(default)]
    reservations: HashMap<MacAddr, Ipv4Addr>,
    #[serde(default = "default_lease_seconds")]
    lease_seconds: u64,
    #[serde(default = "default_http_port")]
    http_port: u16,
    #[serde(default)]
    segmentation_offload: bool,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct RamdiskFile {
    name: String,
    path: PathBuf,
    /// The `reference-values.json` that was built with the image; its command line is used.
    reference: Option<PathBuf>,
    /// The command line itself, where there is no such file.
    command_line: Option<String>,
}

impl Config {
    /// Checks `file`, reading the reference files that it names.
    ///
    /// # Errors
    /// A field that says something impossible, by its name.
    pub fn from_file(file: File, site: SiteDefaults<'_>) -> Result<Self, ConfigError> {
        let interfaces = file.interfaces.into_iter().map(interface).collect::<Result<Vec<_>, _>>()?;
        if interfaces.is_empty() {
            return Err(ConfigError::invalid("netboot.interfaces", "there must be at least one"));
        }
        let mut ramdisks = BTreeMap::new();
        for entry in file.ramdisks {
            let (name, ramdisk) = ramdisk(entry)?;
            if ramdisks.insert(name.clone(), ramdisk).is_some() {
                return Err(ConfigError::invalid(format!("netboot.ramdisks.{name}"), "is there twice"));
            }
        }
        let named = file.node_ramdisks.iter().map(|(node, name)| (format!("netboot.node_ramdisks.{node}"), name));
        for (field, name) in named.chain([("netboot.default_ramdisk".to_owned(), &file.default_ramdisk)]) {
            if !ramdisks.contains_key(name) {
                return Err(ConfigError::invalid(field, format!("no ramdisk is named `{name}`")));
            }
        }
        let verifier_key_sha256 = verifier_key(file.verifier_key_sha256.as_deref().or(site.verifier_key_sha256))?;
        if file.verifier_url.scheme() != "https" {
            return Err(ConfigError::invalid("netboot.verifier_url", "must be an https URL"));
        }
        if !(1..=24 * 60).contains(&file.token_minutes) {
            return Err(ConfigError::invalid("netboot.token_minutes", "must be 1 to 1440"));
        }
        Ok(Self {
            interfaces,
            firmware_loader: file.firmware_loader,
            ramdisks,
            default_ramdisk: file.default_ramdisk,
            node_ramdisks: file.node_ramdisks,
            verifier_url: file.verifier_url,
            verifier_key_sha256,
            lease_log: file.lease_log.unwrap_or_else(|| site.state_dir.join("leases")),
            token_lifetime: Duration::from_secs(file.token_minutes * 60),
        })
    }
}

fn interface(file: InterfaceFile) -> Result<Interface, ConfigError> {
    let invalid = |field: &str, problem: String| {
        ConfigError::invalid(format!("netboot.interfaces.{}.{field}", file.name), problem)
    };
    // IFNAMSIZ, with its NUL.
    if file.name.is_empty() || file.name.len() > 15 || file.name.contains(['/', '\0', ' ']) {
        return Err(ConfigError::invalid("netboot.interfaces.name", format!("`{}` is no interface name", file.name)));
    }
    let pool = match (file.pool_first, file.pool_last) {
        (Some(first), Some(last)) if first <= last => Some((first, last)),
        (Some(_), Some(_)) => return Err(invalid("pool_last", "is below pool_first".into())),
        (None, None) if !file.reservations.is_empty() => None,
        (None, None) => return Err(invalid("pool_first", "there is neither a pool nor a reservation".into())),
        (Some(_), None) | (None, Some(_)) => return Err(invalid("pool_first", "comes with pool_last".into())),
    };
    let size = pool.map_or(0, |(first, last)| u32::from(last) - u32::from(first));
    if size >= MAX_POOL_ADDRESSES {
        return Err(invalid("pool_last", format!("a pool has at most {MAX_POOL_ADDRESSES} addresses")));
    }
    let pool_ends = pool.iter().flat_map(|(first, last)| [*first, *last]);
    let addresses = pool_ends.chain(file.reservations.values().copied()).chain(file.router).chain([file.server]);
    for address in addresses {
        if !file.network.contains(&address) {
            return Err(invalid("network", format!("{address} is not in {}", file.network)));
        }
    }
    let in_pool = |address: &Ipv4Addr| pool.is_some_and(|(first, last)| (first..=last).contains(address));
    if let Some(address) = file.reservations.values().find(|address| in_pool(address)) {
        return Err(invalid("reservations", format!("{address} is also in the pool")));
    }
    if !(60..=86_400).contains(&file.lease_seconds) {
        return Err(invalid("lease_seconds", "must be 60 to 86400".into()));
    }
    let scope = Scope {
        network: file.network.trunc(),
        server: file.server,
        router: file.router,
        pool,
        lease_duration: Duration::from_secs(file.lease_seconds),
    };
    Ok(Interface {
        name: file.name,
        scope,
        relays: file.relays,
        reservations: file.reservations,
        http_port: file.http_port,
        segmentation_offload: file.segmentation_offload,
    })
}

fn ramdisk(file: RamdiskFile) -> Result<(String, Ramdisk), ConfigError> {
    #[derive(Deserialize)]
    struct Reference {
        command_line: String,
    }
    let field = format!("netboot.ramdisks.{}", file.name);
    let command_line = match (file.reference, file.command_line) {
        (Some(path), None) => {
            let text = std::fs::read(&path).map_err(|source| ConfigError::Read { path: path.clone(), source })?;
            let reference: Reference = serde_json::from_slice(&text)
                .map_err(|error| ConfigError::invalid(field.as_str(), format!("{}: {error}", path.display())))?;
            reference.command_line
        }
        (None, Some(command_line)) => command_line,
        (Some(_), Some(_)) | (None, None) => {
            return Err(ConfigError::invalid(field, "give either `reference` or `command_line`"));
        }
    };
    let command_line = command_line.parse().map_err(|error| ConfigError::invalid(field, error))?;
    Ok((file.name, Ramdisk { path: file.path, command_line }))
}

fn verifier_key(key: Option<&str>) -> Result<String, ConfigError> {
    let field = "netboot.verifier_key_sha256";
    let key = key.ok_or_else(|| ConfigError::invalid(field, "is missing, and there is no verifier in this process"))?;
    let mut digest = [0; 32];
    match hex::decode_to_slice(key, &mut digest) {
        Ok(()) => Ok(hex::encode(digest)),
        Err(_) => Err(ConfigError::invalid(field, "must be 64 hexadecimal digits")),
    }
}

fn default_loader() -> PathBuf {
    PathBuf::from("/usr/lib/ipxe/snponly.efi")
}

fn default_token_minutes() -> u64 {
    15
}

fn default_lease_seconds() -> u64 {
    3600
}

fn default_http_port() -> u16 {
    80
}

const MAX_POOL_ADDRESSES: u32 = 65_536;

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        default_ramdisk = "default"
        node_ramdisks = { n2 = "canary" }
        verifier_url = "https://10.99.0.1:8443"
        [[interfaces]]
        name = "airlock0"
        server = "10.99.0.1"
        network = "10.99.0.0/24"
        pool_first = "10.99.0.50"
        pool_last = "10.99.0.99"
        reservations = { "52:54:00:00:00:01" = "10.99.0.10" }
        [[ramdisks]]
        name = "default"
        path = "/agent.efi"
        command_line = "console=ttyS0,115200 panic=30"
        [[ramdisks]]
        name = "canary"
        path = "/canary.efi"
        command_line = "console=ttyS0,115200"
    "#;

    fn config(text: &str) -> Result<Config, String> {
        let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
        let key = "ab".repeat(32);
        let site = SiteDefaults { state_dir: Path::new("/state"), verifier_key_sha256: Some(&key) };
        Config::from_file(file, site).map_err(|error| error.to_string())
    }

    #[test]
    fn a_short_file_is_enough() {
        let config = config(GOOD).unwrap();
        assert_eq!(config.lease_log, Path::new("/state/leases"));
        assert_eq!(config.firmware_loader, Path::new("/usr/lib/ipxe/snponly.efi"));
        assert_eq!(config.token_lifetime, Duration::from_secs(900));
        assert_eq!(config.interfaces[0].http_port, 80);
        assert_eq!(config.ramdisks["default"].command_line.as_str(), "console=ttyS0,115200 panic=30");
    }

    #[test]
    fn impossible_fields_are_named() {
        for (from, to, expected) in [
            (
                "default_ramdisk = \"default\"",
                "default_ramdisk = \"x\"",
                "`netboot.default_ramdisk`: no ramdisk is named `x`",
            ),
            ("n2 = \"canary\"", "n2 = \"y\"", "`netboot.node_ramdisks.n2`: no ramdisk is named `y`"),
            ("https://", "http://", "`netboot.verifier_url`"),
            ("10.99.0.99", "10.99.1.99", "`netboot.interfaces.airlock0.network`: 10.99.1.99"),
            ("10.99.0.99", "10.99.0.49", "`netboot.interfaces.airlock0.pool_last`"),
            ("10.99.0.10\"", "10.99.0.60\"", "`netboot.interfaces.airlock0.reservations`"),
            ("panic=30", "panic=30 ${mac}", "`netboot.ramdisks.default`: kernel command line"),
            ("airlock0", "a-name-that-is-too-long", "`netboot.interfaces.name`"),
            ("name = \"canary\"", "name = \"default\"", "`netboot.ramdisks.default`: is there twice"),
            ("command_line = \"console=ttyS0,115200\"", "", "`netboot.ramdisks.canary`: give either"),
            ("52:54:00:00:00:01", "52:54", "is not a MAC address"),
            ("default_ramdisk", "surprise = 1\ndefault_ramdisk", "unknown field `surprise`"),
        ] {
            assert!(GOOD.contains(from), "{from}");
            let error = config(&GOOD.replace(from, to)).unwrap_err();
            assert!(error.contains(expected), "{from} → {to}: {error}");
        }
    }

    #[test]
    fn the_command_line_comes_from_the_reference_values() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("reference-values.json");
        let line = format!("reference = {:?}", path.display().to_string());
        let text = GOOD.replace("command_line = \"console=ttyS0,115200\"\n", &line);
        assert!(config(&text).unwrap_err().contains("reading the configuration file"));
        std::fs::write(&path, r#"{"name": "canary", "command_line": "quiet", "events": []}"#).unwrap();
        assert_eq!(config(&text).unwrap().ramdisks["canary"].command_line.as_str(), "quiet");
    }
}
