//! Completes the tenant's initrd with two files: `etc/iscsi.initramfs`, which open-iscsi's initramfs script sources, and
//! the state of the attestation, which that script copies to `/run`, so that it is there in the tenant's system too. They
//! go on as a further, uncompressed cpio archive: the kernel unpacks archives one after the other, each starting at a
//! multiple of four octets (kernel documentation, "initramfs buffer format").

use crate::attestation::state::AttestationState;
use crate::cpio::{Archive, CpioError};
use assay_wire::agent::Grant;
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Debian's open-iscsi with CHAP hangs when systemd starts `iscsid`: it drops and re-makes the session, and OpenSSL
/// then reads its configuration from the very disk that is away (open-iscsi#502). The file is sourced by sh before
/// that, so it leaves a drop-in for `iscsid` in `/run`, and the image stays as its owner made it.
const OPENSSL_CURE: &str = "\
mkdir -p /run/systemd/system/iscsid.service.d
printf '[Service]\\nEnvironment=OPENSSL_CONF=/dev/null\\n' > /run/systemd/system/iscsid.service.d/openssl.conf
";

/// Where the state is in the initramfs.
const STATE: &str = "etc/assay/attestation.json";

/// Hands the state of the attestation over: `/run` is the one file system that stays when the root is switched. With no
/// more than an initramfs has (klibc has no `cp`), and for root's eyes only.
const STATE_HANDOVER: &str = "\
if [ -f /etc/assay/attestation.json ]; then
    ( umask 077; mkdir -p /run/assay; cat /etc/assay/attestation.json > /run/assay/attestation.json )
fi
";

/// Appends the archive to the initrd at `path`.
///
/// # Errors
/// See [`InitrdError`].
pub fn append(path: &Path, grant: &Grant, attestation: &AttestationState) -> Result<(), InitrdError> {
    let archive = archive(grant, attestation)?;
    let failed = |source| InitrdError::Write { path: path.to_owned(), source };
    let mut file = OpenOptions::new().append(true).open(path).map_err(failed)?;
    let length = file.seek(SeekFrom::End(0)).map_err(failed)?;
    let padding = length.next_multiple_of(4) - length;
    file.write_all(&[0; 4][..usize::try_from(padding).unwrap_or(0)]).map_err(failed)?;
    file.write_all(&archive).map_err(failed)?;
    Ok(())
}

/// Why an initrd could not be completed.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// A value would not survive a shell's single quotes.
    #[error("writing the initrd's iSCSI configuration: the {field} holds a quote or a control character")]
    Unquotable {
        /// Which one; its value is secret.
        field: &'static str,
    },
    /// The state of the attestation cannot be written.
    #[error("writing the state of the attestation")]
    State {
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
    /// The archive cannot be made.
    #[error("writing the initrd's iSCSI configuration")]
    Cpio(#[from] CpioError),
    /// The file cannot be written.
    #[error("appending to the initrd {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn archive(grant: &Grant, attestation: &AttestationState) -> Result<Zeroizing<Vec<u8>>, InitrdError> {
    let configuration = configuration(grant)?;
    let state = attestation.to_json().map_err(|source| InitrdError::State { source })?;
    let mut archive = Archive::default();
    archive.file("etc/iscsi.initramfs", 0o600, configuration.as_bytes())?;
    archive.directory("etc/assay")?;
    archive.file(STATE, 0o600, &state)?;
    Ok(Zeroizing::new(archive.finish()?))
}

/// Variables of `/usr/share/initramfs-tools/scripts/local-top/iscsi` (open-iscsi 2.1).
fn configuration(grant: &Grant) -> Result<Zeroizing<String>, InitrdError> {
    let mut text = Zeroizing::new(String::with_capacity(2048));
    let portal = (grant.portal.ip().to_string(), grant.portal.port().to_string());
    let variables = [
        ("ISCSI_INITIATOR", "initiator name", grant.initiator.as_str()),
        ("ISCSI_TARGET_NAME", "target name", grant.target.as_str()),
        ("ISCSI_TARGET_IP", "portal's address", &portal.0),
        ("ISCSI_TARGET_PORT", "portal's port", &portal.1),
        ("ISCSI_TARGET_GROUP", "portal group", "1"),
        ("ISCSI_USERNAME", "CHAP name", &grant.chap_name),
        ("ISCSI_PASSWORD", "CHAP secret", &grant.chap_secret),
    ];
    for (variable, field, value) in variables {
        if value.chars().any(|c| c == '\'' || c.is_control()) {
            return Err(InitrdError::Unquotable { field });
        }
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{variable}='{value}'");
    }
    text.push_str(OPENSSL_CURE);
    text.push_str(STATE_HANDOVER);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::process::Command;

    fn grant(secret: &str) -> Grant {
        Grant {
            target: "iqn.2026-01.org.example:disk".parse().unwrap(),
            portal: "10.20.0.1:3260".parse().unwrap(),
            lun: 0,
            initiator: "iqn.2026-01.org.example:node".parse().unwrap(),
            chap_name: "node one".to_owned(),
            chap_secret: secret.to_owned(),
        }
    }

    #[test]
    fn the_shell_reads_back_what_was_written() {
        let configuration = configuration(&grant("$(reboot) \"`\\")).unwrap();
        let variables = configuration.split("mkdir").next().unwrap();
        let script =
            format!("{variables} printf '%s|%s|%s' \"$ISCSI_USERNAME\" \"$ISCSI_PASSWORD\" \"$ISCSI_TARGET_PORT\"");
        let output = Command::new("/bin/sh").arg("-c").arg(script).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "node one|$(reboot) \"`\\|3260");
    }

    #[test]
    fn a_quote_in_the_secret_is_refused_without_showing_it() {
        for secret in ["it's", "a\nb"] {
            let error = configuration(&grant(secret)).unwrap_err();
            assert_eq!(
                error.to_string(),
                "writing the initrd's iSCSI configuration: the CHAP secret holds a quote or a control character"
            );
        }
    }

    #[test]
    fn an_archive_follows_at_a_multiple_of_four() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), b"12345").unwrap();
        let state = AttestationState::example();
        append(file.path(), &grant("sixteen-secrets!"), &state).unwrap();
        let content = fs::read(file.path()).unwrap();
        assert_eq!(content[..8], *b"12345\0\0\0");
        assert_eq!(content[8..14], *b"070701");

        let directory = tempfile::tempdir().unwrap();
        let archive = directory.path().join("archive");
        fs::write(&archive, &content[8..]).unwrap();
        let unpacked = Command::new("cpio")
            .args(["-id", "--quiet", "-F"])
            .arg(&archive)
            .current_dir(directory.path())
            .status()
            .unwrap();
        assert!(unpacked.success());
        let unpacked = directory.path().join("etc/iscsi.initramfs");
        assert!(fs::read_to_string(&unpacked).unwrap().contains("ISCSI_PASSWORD='sixteen-secrets!'\n"));
        let handed = directory.path().join(STATE);
        assert_eq!(AttestationState::read(&handed).unwrap(), state);
        for file in [unpacked, handed] {
            let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(file).unwrap().permissions());
            assert_eq!(mode & 0o777, 0o600);
        }
    }

    #[test]
    fn the_shell_moves_the_state_to_run_for_root_alone() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("etc/assay")).unwrap();
        let source = directory.path().join(STATE);
        fs::write(&source, "{}").unwrap();
        let root = format!("{}/", directory.path().display());
        let script =
            STATE_HANDOVER.replace(" /etc/", &format!(" {root}etc/")).replace(" /run/", &format!(" {root}run/"));
        for _twice in 0..2 {
            let done = Command::new("/bin/sh").args(["-eu", "-c", &script]).status().unwrap();
            assert!(done.success());
        }
        let state = directory.path().join("run/assay/attestation.json");
        assert_eq!(fs::read_to_string(&state).unwrap(), "{}");
        for (path, expected) in [(state.as_path(), 0o600), (&directory.path().join("run/assay"), 0o700)] {
            let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(path).unwrap().permissions());
            assert_eq!(mode & 0o777, expected, "{}", path.display());
        }
    }
}
