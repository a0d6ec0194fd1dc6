//! The Redfish driver against a server that we did not write: sushy-tools' emulator, over TLS with basic
//! authentication.
//!
//! The emulator comes from PyPI into a virtual environment below the target folder. Where that is not to be had (no
//! python3-venv, no network) the test says so and ends.

use assay_isolation::bmc::redfish::{Redfish, RedfishAccess};
use assay_isolation::bmc::{BmcDriver as _, BmcError, PowerAction, PowerState};
use assay_isolation::secret::Password;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tokio::time::timeout;

/// The emulator's one fake system.
const SYSTEM: &str = "redfish/v1/Systems/27946b59-9e44-4fa7-8e91-f3527a1ef094";

struct Emulator {
    process: Child,
    base: String,
    certificate: String,
    _folder: tempfile::TempDir,
}

impl Emulator {
    fn start(venv: &Path) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name).display().to_string();
        let openssl = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
            .args(["-keyout", &at("key.pem"), "-out", &at("cert.pem"), "-subj", "/CN=bmc"])
            .args(["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"])
            .output()
            .expect("openssl runs");
        assert!(openssl.status.success(), "{}", String::from_utf8_lossy(&openssl.stderr));
        let hash = "import bcrypt; print('root:' + bcrypt.hashpw(b'calvin', bcrypt.gensalt()).decode())";
        let hashed = Command::new(venv.join("bin/python")).args(["-c", hash]).output().expect("python runs");
        std::fs::write(at("auth"), hashed.stdout).expect("a file");
        std::fs::write(at("conf"), format!("SUSHY_EMULATOR_AUTH_FILE = \"{}\"\n", at("auth"))).expect("a file");
        let mut process = Command::new(venv.join("bin/sushy-emulator"))
            .args(["--fake", "--config", &at("conf"), "-i", "127.0.0.1", "-p", "0"])
            .args(["--ssl-certificate", &at("cert.pem"), "--ssl-key", &at("key.pem")])
            .current_dir(folder.path())
            .env("TMPDIR", folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the emulator starts");
        let mut lines = BufReader::new(process.stderr.take().expect("a pipe")).lines().map_while(Result::ok);
        let base = lines.find_map(|line| line.split_once("Running on ").map(|(_, base)| base.trim().to_owned()));
        // It logs every request: somebody must read.
        std::thread::spawn(move || lines.for_each(drop));
        let certificate = std::fs::read_to_string(at("cert.pem")).expect("the certificate");
        Self { process, base: base.expect("it says where it listens"), certificate, _folder: folder }
    }

    fn driver(&self, password: &str, ca_pem: Option<&str>, allow_continuous: bool) -> Redfish {
        let access = RedfishAccess {
            system: &format!("{}/{SYSTEM}", self.base),
            username: "root".into(),
            password: Password::new(password),
            ca_pem,
            timeout: Duration::from_secs(5),
            allow_continuous,
        };
        Redfish::new(access).expect("a driver")
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// None where the emulator cannot be had.
fn venv() -> Option<PathBuf> {
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join("sushy-venv");
    let runs = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
    let ready = venv.join("ready");
    if !ready.exists() {
        let made = runs(Command::new("python3").args(["-m", "venv"]).arg(&venv))
            && runs(Command::new(venv.join("bin/pip")).args(["install", "-q", "sushy-tools==2.2.0", "bcrypt"]));
        if !made || std::fs::write(ready, "").is_err() {
            return None;
        }
    }
    Some(venv)
}

async fn until(driver: &Redfish, power: PowerState) {
    let asking = async { while driver.read().await.expect("it answers").power != power {} };
    timeout(Duration::from_secs(30), asking).await.unwrap_or_else(|_| panic!("never {power:?}"));
}

#[tokio::test]
async fn power_boot_override_and_refusals() {
    let Some(venv) = venv() else {
        println!("SKIPPED: sushy-tools cannot be installed here (python3-venv and PyPI are needed)");
        return;
    };
    let emulator = Emulator::start(&venv);
    let ca = Some(emulator.certificate.as_str());
    let driver = emulator.driver("calvin", ca, true);
    for (action, state) in
        [(PowerAction::On, PowerState::On), (PowerAction::ForceOff, PowerState::Off), (PowerAction::On, PowerState::On)]
    {
        driver.power(action).await.expect("accepted");
        until(&driver, state).await;
    }
    // It has no LastResetTime: the life cycle will not let such a node into the airlock.
    assert_eq!(driver.read().await.expect("it answers").last_reset, None);

    // It answers 204 to "Once" and then shows "Continuous": only for sites that allow that.
    driver.boot_once_from_pxe().await.expect("allowed");
    let strict = emulator.driver("calvin", ca, false);
    match strict.boot_once_from_pxe().await {
        Err(BmcError::BootOverride { target, enabled, .. }) => {
            assert_eq!((target.as_str(), enabled.as_str()), ("Pxe", "Continuous"));
        }
        other => panic!("{other:?}"),
    }

    let wrong = emulator.driver("hobbes", ca, false).read().await.expect_err("a wrong password");
    assert!(matches!(wrong, BmcError::Status { status: 401, .. }), "{wrong}");
    let stranger = emulator.driver("calvin", None, false).read().await.expect_err("an unknown CA");
    assert!(matches!(stranger, BmcError::Http { .. }), "{stranger}");
    assert!(!format!("{stranger:?} {wrong:?} {driver:?}").contains("calvin"));
}
