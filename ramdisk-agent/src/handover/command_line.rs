//! The tenant kernel's command line: the image's own, and this node's network. No secret is ever on it.

use super::Handover;

/// What an image without a command line of its own gets, after its root.
const DEFAULT_OPTIONS: &str = "ro console=tty0 console=ttyS0,115200";

/// The command line: `image` if the image has one, else a default with `root`; then `ip=` (kernel documentation,
/// "nfsroot") with the tenant address, and `BOOTIF=` so that initramfs-tools configures the NIC that was moved and no
/// other. The device field stays empty: names differ between kernel and udev, the address of the NIC does not.
#[must_use]
pub fn tenant(image: Option<&str>, root: &str, handover: &Handover<'_>) -> String {
    let base = match image {
        Some(line) if !line.is_empty() => line.to_owned(),
        _ => format!("root={root} {DEFAULT_OPTIONS}"),
    };
    let address = handover.address;
    let router = address.router.map(|router| router.to_string()).unwrap_or_default();
    let nic = handover.nic.to_string().replace(':', "-");
    format!(
        "{base} ip={}::{router}:{}:{}::off BOOTIF=01-{nic}",
        address.address.addr(),
        address.address.netmask(),
        handover.node
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use assay_wire::agent::{Grant, TenantAddress};

    fn line(image: Option<&str>, router: Option<&str>) -> String {
        let grant = Grant {
            target: "iqn.2026-01.org.example:disk".parse().unwrap(),
            portal: "10.20.0.1:3260".parse().unwrap(),
            lun: 0,
            initiator: "iqn.2026-01.org.example:node".parse().unwrap(),
            chap_name: "name".to_owned(),
            chap_secret: "sixteen-secrets!".to_owned(),
        };
        let address = TenantAddress {
            address: "10.20.0.50/24".parse().unwrap(),
            router: router.map(|router| router.parse().unwrap()),
            relay: "10.20.0.1:8443".parse().unwrap(),
        };
        let nic = "52:54:00:00:00:01".parse().unwrap();
        let attestation = crate::attestation::state::AttestationState::example();
        let node = &"n1".parse().unwrap();
        let handover = Handover { grant: &grant, address: &address, nic, node, attestation: &attestation };
        tenant(image, "LABEL=tenant", &handover)
    }

    #[test]
    fn the_images_line_and_the_nodes_network() {
        assert_eq!(
            line(Some("root=LABEL=r quiet"), Some("10.20.0.1")),
            "root=LABEL=r quiet ip=10.20.0.50::10.20.0.1:255.255.255.0:n1::off BOOTIF=01-52-54-00-00-00-01"
        );
    }

    #[test]
    fn an_image_without_a_line_boots_from_its_label() {
        let line = line(None, None);
        assert!(line.starts_with("root=LABEL=tenant ro console="), "{line}");
        assert!(line.contains(" ip=10.20.0.50:::255.255.255.0:n1::off "), "{line}");
    }

    #[test]
    fn no_secret_is_on_it() {
        let line = line(None, None);
        assert!(!line.contains("sixteen") && !line.contains(crate::attestation::state::EXAMPLE_PROOF));
    }
}
