//! A real software TPM (swtpm) for tests, driven with tpm2-tools over a Unix socket in a directory of its own.
//!
//! Only behind the feature `testing`. Everything here panics on failure, as tests do.

mod network;

pub use self::network::NetworkTpm;

use crate::algorithm::HashAlgorithm;
use crate::public::{Public, Scheme};
use assay_wire::agent::Credential;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// One swtpm process and the keys that were made in it. Gone when dropped, and with the thread that started it.
#[derive(Debug)]
pub struct SoftTpm {
    directory: TempDir,
    process: Child,
}

/// What kind of key to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    /// RSA 2048; an AK signs with RSASSA and SHA-256.
    Rsa,
    /// RSA 2048; an AK signs with RSAPSS and SHA-256.
    RsaPss,
    /// P-256; an AK signs with ECDSA and SHA-256.
    Ecc,
    /// P-384; an AK signs with ECDSA and SHA-384.
    EccP384,
}

/// A signed quote as the TPM made it.
#[derive(Debug, Clone)]
pub struct SignedQuote {
    /// `TPMS_ATTEST`.
    pub attest: Vec<u8>,
    /// `TPMT_SIGNATURE`.
    pub signature: Vec<u8>,
}

impl SoftTpm {
    /// Starts a fresh TPM without EK certificate.
    #[must_use]
    pub fn start() -> Self {
        Self::start_in(TempDir::new().expect("temporary directory"))
    }

    /// Starts a TPM that was manufactured with EK certificates from a CA of its own.
    /// Returns the PEMs of root and issuer, too.
    #[must_use]
    pub fn start_with_ek_certificate() -> (Self, Vec<Vec<u8>>) {
        let directory = TempDir::new().expect("temporary directory");
        let pems = manufacture(directory.path());
        (Self::start_in(directory), pems)
    }

    fn start_in(directory: TempDir) -> Self {
        let process = power_on(directory.path());
        Self { directory, process }
    }

    /// Cuts the power without `TPM2_Shutdown` and starts again: a TPM reset that the TPM was not told of. Keys are
    /// gone.
    pub fn cut_power(&mut self) {
        self.process.kill().expect("swtpm is killed");
        self.process.wait().expect("swtpm ends");
        self.process = power_on(self.directory.path());
    }

    /// Makes the EK with the default template and returns its `TPMT_PUBLIC`.
    #[must_use]
    pub fn create_ek(&self, kind: KeyKind) -> Vec<u8> {
        self.tool("tpm2_createek", &["-c", "ek.ctx", "-G", kind.algorithm(), "-u", "ek.pub"]);
        self.flush();
        self.public("ek.pub")
    }

    /// The P-384 EK that `start_with_ek_certificate` left in the TPM, of a template of the high range: who uses it gives
    /// its (empty) authorization and no policy.
    #[must_use]
    pub fn p384_ek(&self) -> Vec<u8> {
        self.tool("tpm2_readpublic", &["-c", P384_EK, "-o", "p384.pub"]);
        self.public("p384.pub")
    }

    /// Makes an AK (P-384, ECDSA, SHA-384) under the P-384 EK and returns its `TPMT_PUBLIC`.
    #[must_use]
    pub fn create_ak_under_p384_ek(&self) -> Vec<u8> {
        let attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign";
        let key = ["-C", P384_EK, "-G", "ecc384:ecdsa-sha384:null", "-g", "sha384", "-a", attributes];
        self.tool("tpm2_create", &[&key[..], &["-u", "ak.pub", "-r", "ak.priv"]].concat());
        self.flush();
        self.tool("tpm2_load", &["-C", P384_EK, "-u", "ak.pub", "-r", "ak.priv", "-c", "ak.ctx"]);
        self.flush();
        self.public("ak.pub")
    }

    /// `TPM2_ActivateCredential` with the P-384 EK; what the TPM says when it refuses is the error.
    ///
    /// # Errors
    /// The TPM refused.
    pub fn activate_with_p384_ek(&self, credential: &Credential) -> Result<Vec<u8>, String> {
        self.write_credential(credential);
        let arguments = ["-c", "ak.ctx", "-C", P384_EK, "-i", "credential", "-o", "secret"];
        let output = self.run("tpm2_activatecredential", &arguments);
        self.flush();
        self.activated(&output)
    }

    /// Makes the EK as `create_ek` does, but so that the TPM can afterwards say that it did ([`Self::certify_ek`]).
    #[must_use]
    pub fn create_certifiable_ek(&self) -> Vec<u8> {
        fs::write(self.path("policy"), hex::decode(EK_POLICY).expect("hexadecimal")).expect("policy file");
        let attributes = "fixedtpm|fixedparent|sensitivedataorigin|adminwithpolicy|restricted|decrypt";
        let key = ["-C", "e", "-G", "rsa2048:aes128cfb", "-g", "sha256", "-a", attributes, "-L", "policy"];
        self.tool("tpm2_createprimary", &[&key[..], &["-c", "ek.ctx", "-d", "creation", "-t", "ticket"]].concat());
        self.flush();
        self.tool("tpm2_readpublic", &["-c", "ek.ctx", "-o", "ek.pub"]);
        self.flush();
        self.public("ek.pub")
    }

    /// `TPM2_CertifyCreation` of that EK by the AK, which plays an IAK.
    #[must_use]
    pub fn certify_ek(&self) -> SignedQuote {
        let key = ["-C", "ak.ctx", "-c", "ek.ctx", "-d", "creation", "-t", "ticket", "-g", "sha256"];
        let out = ["--scheme", "ecdsa", "--attestation", "attest", "-o", "signature", "-f", "tss"];
        self.tool("tpm2_certifycreation", &[&key[..], &out].concat());
        self.flush();
        let read = |name: &str| fs::read(self.path(name)).expect("statement's file");
        SignedQuote { attest: read("attest"), signature: read("signature") }
    }

    /// Makes an AK under the EK and returns its `TPMT_PUBLIC`.
    #[must_use]
    pub fn create_ak(&self, kind: KeyKind) -> Vec<u8> {
        let arguments = ["-C", "ek.ctx", "-c", "ak.ctx", "-u", "ak.pub", "-r", "ak.priv", "-g", kind.hash()];
        self.tool("tpm2_createak", &[&arguments[..], &["-G", kind.algorithm(), "-s", kind.scheme()]].concat());
        self.flush();
        self.public("ak.pub")
    }

    /// Loads the AK of [`SoftTpm::create_ak`] again, as after a reset: the EK comes back from its template.
    pub fn reload_ak(&self, ek: KeyKind) {
        let _same = self.create_ek(ek);
        self.tool("tpm2_startauthsession", &["--policy-session", "-S", "session.ctx"]);
        self.tool("tpm2_policysecret", &["-S", "session.ctx", "-c", "e"]);
        let keys = ["-C", "ek.ctx", "-u", "ak.pub", "-r", "ak.priv", "-c", "ak.ctx"];
        self.tool("tpm2_load", &[&keys[..], &["-P", "session:session.ctx"]].concat());
        self.tool("tpm2_flushcontext", &["session.ctx"]);
        self.flush();
    }

    /// Makes a signing key that is *not* restricted, takes it for the AK, and returns its `TPMT_PUBLIC`.
    #[must_use]
    pub fn create_unrestricted_key(&self) -> Vec<u8> {
        self.tool("tpm2_createprimary", &["-C", "o", "-c", "primary.ctx"]);
        let attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign";
        let arguments = ["-C", "primary.ctx", "-G", "rsa2048:rsassa-sha256:null", "-a", attributes, "-u", "ak.pub"];
        self.tool("tpm2_create", &[&arguments[..], &["-r", "ak.priv"]].concat());
        self.flush();
        self.tool("tpm2_load", &["-C", "primary.ctx", "-u", "ak.pub", "-r", "ak.priv", "-c", "ak.ctx"]);
        self.flush();
        self.public("ak.pub")
    }

    /// The EK certificate (RSA) as NV holds it.
    #[must_use]
    pub fn ek_certificate(&self) -> Vec<u8> {
        self.tool("tpm2_nvread", &["-C", "o", "-o", "ek.crt", "0x1c00002"]);
        fs::read(self.path("ek.crt")).expect("EK certificate")
    }

    /// The P-384 EK's certificate as NV holds it.
    #[must_use]
    pub fn p384_ek_certificate(&self) -> Vec<u8> {
        self.tool("tpm2_nvread", &["-C", "o", "-o", "ek.crt", "0x1c00016"]);
        fs::read(self.path("ek.crt")).expect("EK certificate")
    }

    /// `TPM2_ActivateCredential`; what the TPM says when it refuses is the error.
    ///
    /// # Errors
    /// The TPM refused.
    pub fn activate(&self, credential: &Credential) -> Result<Vec<u8>, String> {
        self.write_credential(credential);
        self.tool("tpm2_startauthsession", &["--policy-session", "-S", "session.ctx"]);
        self.tool("tpm2_policysecret", &["-S", "session.ctx", "-c", "e"]);
        let arguments =
            ["-c", "ak.ctx", "-C", "ek.ctx", "-i", "credential", "-o", "secret", "-P", "session:session.ctx"];
        let output = self.run("tpm2_activatecredential", &arguments);
        self.tool("tpm2_flushcontext", &["session.ctx"]);
        self.flush();
        self.activated(&output)
    }

    /// tpm2-tools' file: magic, version, `TPM2B_ID_OBJECT`, `TPM2B_ENCRYPTED_SECRET`.
    fn write_credential(&self, credential: &Credential) {
        let mut file = vec![0xba, 0xdc, 0xc0, 0xde, 0, 0, 0, 1];
        for part in [&credential.id_object, &credential.encrypted_secret] {
            file.extend_from_slice(&u16::try_from(part.len()).expect("small").to_be_bytes());
            file.extend_from_slice(part);
        }
        fs::write(self.path("credential"), file).expect("credential file");
    }

    fn activated(&self, output: &Output) -> Result<Vec<u8>, String> {
        if output.status.success() {
            Ok(fs::read(self.path("secret")).expect("activated secret"))
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }

    /// Quotes a selection like `sha256:0,1,2` with the AK.
    #[must_use]
    pub fn quote(&self, nonce: &[u8], selection: &str) -> SignedQuote {
        let nonce = hex::encode(nonce);
        let arguments = ["-c", "ak.ctx", "-l", selection, "-q", &nonce, "-m", "attest", "-s", "signature", "-f", "tss"];
        let (scheme, hash) = match Public::parse(&self.public("ak.pub")).expect("AK").scheme() {
            Some(Scheme::RsaPss(hash)) => ("rsapss", hash),
            Some(Scheme::Ecdsa(hash)) => ("ecdsa", hash),
            Some(Scheme::RsaSsa(hash)) => ("rsassa", hash),
            Some(Scheme::Other(_)) | None => ("rsassa", HashAlgorithm::Sha256),
        };
        self.tool("tpm2_quote", &[&arguments[..], &["-g", hash.as_str(), "--scheme", scheme]].concat());
        self.flush();
        let read = |name: &str| fs::read(self.path(name)).expect("quote file");
        SignedQuote { attest: read("attest"), signature: read("signature") }
    }

    /// Extends a PCR of the SHA-256 bank.
    pub fn extend(&self, pcr: u8, digest: &[u8; 32]) {
        self.tool("tpm2_pcrextend", &[&format!("{pcr}:sha256={}", hex::encode(digest))]);
    }

    /// The SHA-256 PCRs 0 to 23.
    #[must_use]
    pub fn pcrs(&self) -> Vec<[u8; 32]> {
        let all = (0..24).map(|pcr| pcr.to_string()).collect::<Vec<_>>().join(",");
        self.tool("tpm2_pcrread", &[&format!("sha256:{all}"), "-o", "pcrs"]);
        let values = fs::read(self.path("pcrs")).expect("PCR file");
        let values: Vec<_> = values.chunks_exact(32).map(|value| value.try_into().expect("32 octets")).collect();
        assert_eq!(values.len(), 24, "tpm2_pcrread did not give every PCR");
        values
    }

    /// The directory that holds the TPM's state and the tools' files.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Runs a tool that must succeed.
    pub fn tool(&self, name: &str, arguments: &[&str]) {
        succeeded(name, &self.run(name, arguments));
    }

    fn run(&self, name: &str, arguments: &[&str]) -> Output {
        Command::new(name)
            .args(arguments)
            .current_dir(self.directory())
            .env("TPM2TOOLS_TCTI", format!("swtpm:path={}", self.path("tpm").display()))
            .output()
            .unwrap_or_else(|error| panic!("{name} does not run (Debian package tpm2-tools): {error}"))
    }

    fn flush(&self) {
        self.tool("tpm2_flushcontext", &["-t"]);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory().join(name)
    }

    /// A `TPM2B_PUBLIC` file without its size.
    fn public(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).expect("public area")[2..].to_vec()
    }
}

impl Drop for SoftTpm {
    fn drop(&mut self) {
        // It may have died already; the directory goes either way.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl KeyKind {
    fn algorithm(self) -> &'static str {
        match self {
            Self::Rsa | Self::RsaPss => "rsa",
            Self::Ecc => "ecc",
            Self::EccP384 => "ecc384",
        }
    }

    fn hash(self) -> &'static str {
        match self {
            Self::Rsa | Self::RsaPss | Self::Ecc => "sha256",
            Self::EccP384 => "sha384",
        }
    }

    fn scheme(self) -> &'static str {
        match self {
            Self::Rsa => "rsassa",
            Self::RsaPss => "rsapss",
            Self::Ecc | Self::EccP384 => "ecdsa",
        }
    }
}

/// Where swtpm_setup keeps the P-384 EK.
const P384_EK: &str = "0x81010016";
/// PolicyA of the EK Credential Profile: the endorsement hierarchy's word.
const EK_POLICY: &str = "837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa";

/// Gives the TPM in `directory` EK certificates from a CA of its own. Returns the PEMs of root and issuer.
fn manufacture(directory: &Path) -> Vec<Vec<u8>> {
    let path = |name: &str| directory.join(name).display().to_string();
    fs::create_dir(path("state")).expect("state directory");
    let ca = format!(
        "statedir = {0}\nsigningkey = {0}/signkey.pem\nissuercert = {0}/issuercert.pem\n\
         certserial = {0}/certserial\n",
        path("ca")
    );
    fs::create_dir(path("ca")).expect("CA directory");
    fs::write(path("ca.conf"), ca).expect("CA configuration");
    fs::write(path("ca.options"), "--platform-manufacturer Assay\n--platform-version 1\n--platform-model test\n")
        .expect("CA options");
    let setup = format!(
        "create_certs_tool = /usr/bin/swtpm_localca\ncreate_certs_tool_config = {}\n\
         create_certs_tool_options = {}\n",
        path("ca.conf"),
        path("ca.options")
    );
    fs::write(path("setup.conf"), setup).expect("setup configuration");
    let output = Command::new("swtpm_setup")
        .args(["--tpm2", "--create-ek-cert", "--pcr-banks", "sha256", "--overwrite"])
        .args(["--tpmstate", &path("state"), "--config", &path("setup.conf")])
        .output()
        .expect("swtpm_setup runs (Debian package swtpm-tools)");
    succeeded("swtpm_setup", &output);
    let pems = ["ca/swtpm-localca-rootca-cert.pem", "ca/issuercert.pem"];
    pems.map(|name| fs::read(path(name)).expect("CA certificate")).to_vec()
}

/// Starts swtpm on the state in `directory` and waits until it listens.
fn power_on(directory: &Path) -> Child {
    let socket = directory.join("tpm");
    let control = control_of(&socket);
    for stale in [&socket, &control] {
        let _ = fs::remove_file(stale); // left by a process whose power was cut
    }
    let process = swtpm(directory, &[&socket, &control].map(|path| format!("type=unixio,path={}", path.display())));
    let deadline = Instant::now() + Duration::from_secs(20);
    while UnixStream::connect(&socket).and_then(|_| UnixStream::connect(&control)).is_err() {
        assert!(Instant::now() < deadline, "swtpm did not listen on {} in 20 s", control.display());
        std::thread::park_timeout(Duration::from_millis(2));
    }
    process
}

/// Starts swtpm with a server and a control channel. It dies with the thread that started it.
fn swtpm(directory: &Path, [server, control]: &[String; 2]) -> Child {
    let state = directory.join("state");
    fs::create_dir_all(&state).expect("state directory");
    Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "swtpm", "socket", "--tpm2", "--flags", "not-need-init,startup-clear"])
        .args(["--tpmstate", &format!("dir={}", state.display()), "--server", server, "--ctrl", control])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("swtpm starts (Debian packages swtpm, util-linux)")
}

/// SHA-256 as an array.
#[must_use]
pub fn sha256(data: &[u8]) -> [u8; 32] {
    let mut digest = [0; 32];
    digest.copy_from_slice(HashAlgorithm::Sha256.digest(data).as_ref());
    digest
}

/// Where the swtpm TCTI looks for the control channel.
fn control_of(socket: &Path) -> PathBuf {
    let mut control = socket.as_os_str().to_owned();
    control.push(".ctrl");
    control.into()
}

fn succeeded(name: &str, output: &Output) {
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
}
