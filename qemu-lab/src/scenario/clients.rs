//! Initiators that are not ours, against `assay imaging export-file`: Linux with multipath, of which one path is cut
//! under load, and iPXE, which boots from a target. No site and no services: two cables and a machine.

use crate::command::{command, run, wait_until};
use crate::console::Console;
use crate::error::{LabError, Result};
use crate::events::EventLog;
use crate::machine::{OVMF_CODE, OVMF_VARS};
use crate::netns::Netns;
use ipnet::Ipv4Net;
use serde_json::json;
use std::ffi::OsString;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::process::{Child, Command};

/// A cable from the machine to the target's host.
struct Cable {
    tap: &'static str,
    mac: &'static str,
    host: Ipv4Addr,
    machine: Ipv4Addr,
}

/// The target's host, with its cables, and the machine's console.
struct Rig {
    folder: PathBuf,
    host: Netns,
    console: Console,
}

/// fio writes to a target over two paths; one is cut; everything is read back and is what was written.
///
/// # Errors
/// Something that must hold did not.
pub(super) async fn multipath(folder: &Path, cache: &Path, events: &EventLog) -> Result<()> {
    let rig = Rig::build(folder, "workbench").await?;
    let disk = rig.folder.join("disk.raw");
    new_file(&disk, 96 << 20)?;
    let _target = rig.export(&disk).await?;
    let system = crate::image::workbench(cache, |_| {}).await?;
    let (kernel, initrd) = kernel_of(&system, &rig.folder).await?;
    leave_iscsi_to_the_script(&initrd, &rig.folder).await?;
    let script = rig.folder.join("script");
    fs::write(&script, script_disk()).map_err(LabError::io(format!("writing {}", script.display())))?;
    let text = |path: &Path| path.display().to_string();
    let arguments = [
        ("-kernel", text(&kernel)),
        ("-initrd", text(&initrd)),
        ("-append", "root=LABEL=tenant rw console=ttyS0,115200 loglevel=4".to_owned()),
        ("-drive", format!("if=virtio,format=raw,snapshot=on,file={}", system.display())),
        ("-drive", format!("if=virtio,format=raw,readonly=on,file={}", script.display())),
    ];
    let _machine = rig.start(&arguments).await?;
    rig.says("two paths to").await?;
    rig.says("workbench: writing").await?;
    rig.host.ip(&["link", "set", CABLES[1].tap, "down"]).await?;
    events.lab("path.cut", &json!({ "tap": CABLES[1].tap }));
    rig.says("one path is left").await?;
    rig.says("writing goes on").await?;
    let fio = rig.console.position();
    rig.says("workbench: verified").await?;
    let said = rig.console.lines_from(fio.saturating_sub(8)).join(" | ");
    events.lab("multipath.verified", &json!({ "said": said }));
    Ok(())
}

/// iPXE, started by the firmware from a disk that has nothing but it, boots what a target holds, with CHAP.
///
/// # Errors
/// Something that must hold did not.
pub(super) async fn sanboot(folder: &Path, agent_image: &Path, events: &EventLog) -> Result<()> {
    let rig = Rig::build(folder, "diskless").await?;
    let disk = rig.folder.join("disk.raw");
    efi_disk(&disk, 64 << 20, &[(&agent_image.join("agent.efi"), "EFI/BOOT/BOOTX64.EFI")]).await?;
    let _target = rig.export(&disk).await?;
    let script = rig.folder.join("script.ipxe");
    fs::write(&script, ipxe_script()).map_err(LabError::io(format!("writing {}", script.display())))?;
    let loader = rig.folder.join("ipxe.raw");
    efi_disk(&loader, 16 << 20, &[(Path::new(IPXE), "EFI/BOOT/BOOTX64.EFI")]).await?;
    let variables = rig.folder.join("variables.fd");
    fs::copy(OVMF_VARS, &variables).map_err(LabError::io(format!("copying {OVMF_VARS} (package ovmf)")))?;
    // QEMU's own little network hands iPXE its script; the cables come after it.
    let script_net = format!("user,id=script,restrict=on,tftp={},bootfile=script.ipxe", rig.folder.display());
    let arguments = [
        ("-netdev", script_net),
        ("-device", "virtio-net-pci,netdev=script,romfile=".to_owned()),
        ("-drive", format!("if=pflash,format=raw,unit=0,readonly=on,file={OVMF_CODE}")),
        ("-drive", format!("if=pflash,format=raw,unit=1,file={}", variables.display())),
        ("-drive", format!("if=none,id=loader,format=raw,readonly=on,file={}", loader.display())),
        ("-device", "virtio-blk-pci,drive=loader,bootindex=0".to_owned()),
    ];
    let _machine = rig.start(&arguments).await?;
    rig.says("Registered SAN device").await?;
    let line = rig.says("assay agent").await?;
    events.lab("sanboot.booted", &json!({ "said": line }));
    Ok(())
}

impl Rig {
    async fn build(folder: &Path, machine: &str) -> Result<Self> {
        fs::create_dir_all(folder).map_err(LabError::io(format!("making {}", folder.display())))?;
        let host = Netns::create("target").await?;
        for cable in CABLES {
            host.tap(cable.tap).await?;
            host.address(cable.tap, Ipv4Net::new_assert(cable.host, PREFIX)).await?;
        }
        let console = Console::create(machine, &folder.join("console.log"))?;
        Ok(Self { folder: folder.to_owned(), host, console })
    }

    /// Has `assay imaging export-file` export a disk with CHAP, on all cables.
    async fn export(&self, disk: &Path) -> Result<Child> {
        let secret = self.folder.join("chap-secret");
        fs::write(&secret, CHAP_SECRET).map_err(LabError::io(format!("writing {}", secret.display())))?;
        let log = self.folder.join("target.log");
        let words = || fs::File::create(&log).map_err(LabError::io(format!("creating {}", log.display())));
        let assay = crate::services::assay_binary()?.display().to_string();
        let mut target = self.host.command(&assay);
        target.args(["imaging", "export-file"]).arg(disk).args(["--listen", &format!("0.0.0.0:{PORT}")]);
        target.args(["--target", TARGET, "--initiator", INITIATOR]);
        target.args(["--chap", &format!("{CHAP_USER}:{}", secret.display())]);
        target.stdout(words()?).stderr(words()?);
        let mut child = target.spawn().map_err(LabError::io("starting the target"))?;
        let listening = format!(":{PORT} ");
        wait_until("starting the target", START_LIMIT, || async {
            let sockets = run(self.ss(), "looking for the target's socket", START_LIMIT).await;
            sockets.is_ok_and(|sockets| sockets.contains(&listening)).then_some(())
        })
        .await
        .map_err(|error| match child.try_wait() {
            Ok(Some(status)) => LabError::unexpected(
                "starting the target",
                format!("it ended ({status}): {}", fs::read_to_string(&log).unwrap_or_default()),
            ),
            Ok(None) | Err(_) => error,
        })?;
        Ok(child)
    }

    fn ss(&self) -> Command {
        let mut ss = self.host.command("ss");
        ss.args(["--listening", "--tcp", "--numeric", "--no-header"]);
        ss
    }

    /// Turns a machine on that has the cables and is else made of `more`.
    async fn start(&self, more: &[(&str, String)]) -> Result<Child> {
        let mut qemu = self.host.command("qemu-system-x86_64");
        let words = self.folder.join("qemu.log");
        let words = fs::File::create(&words).map_err(LabError::io(format!("creating {}", words.display())))?;
        qemu.args(["-nodefaults", "-no-user-config", "-machine", "q35,hpet=off", "-accel", "tcg,thread=multi"]);
        qemu.args(["-cpu", "qemu64", "-smp", "1", "-m", "768", "-display", "none", "-no-reboot"]);
        qemu.args(["-device", "virtio-rng-pci", "-chardev", "stdio,id=console,signal=off"]);
        qemu.args(["-serial", "chardev:console"]);
        qemu.args(more.iter().flat_map(|(flag, value)| [OsString::from(flag), OsString::from(value)]));
        for (number, cable) in CABLES.iter().enumerate() {
            let netdev = format!("tap,id=net{number},ifname={},script=no,downscript=no", cable.tap);
            let device = format!("virtio-net-pci,netdev=net{number},mac={},romfile=", cable.mac);
            qemu.args(["-netdev", &netdev, "-device", &device]);
        }
        qemu.stdout(Stdio::piped()).stderr(words);
        let mut machine = qemu.spawn().map_err(LabError::io("starting QEMU"))?;
        if let Some(stdout) = machine.stdout.take() {
            tokio::spawn(self.console.clone().capture(stdout));
        }
        Ok(machine)
    }

    /// Waits for words on the console; whatever the machine says of a failure ends the wait.
    async fn says(&self, wanted: &str) -> Result<String> {
        tokio::select! {
            said = self.console.wait_for(wanted, 0, MACHINE_LIMIT) => said,
            failed = self.failure() => {
                let last = self.console.lines_from(self.console.position().saturating_sub(20)).join("\n");
                Err(LabError::unexpected(format!("waiting for `{wanted}`"), format!("{failed}: {last}")))
            }
        }
    }

    /// Over when the machine says that it failed.
    async fn failure(&self) -> String {
        let ways = ["workbench: failed", "Boot from SAN device 0x80 failed"];
        let [script, sanboot] = ways.map(|said| self.console.wait_for(said, 0, MACHINE_LIMIT * 2));
        tokio::select! {
            Ok(line) = script => line,
            Ok(line) = sanboot => line,
            else => std::future::pending().await,
        }
    }
}

/// The script of the workbench with what it is to use, as a disk of whole sectors.
fn script_disk() -> Vec<u8> {
    let mut script = format!("TARGET={TARGET} INITIATOR={INITIATOR} USER={CHAP_USER} SECRET={CHAP_SECRET}\n");
    for (number, cable) in (1..).zip(CABLES) {
        let Cable { mac, host, machine, tap: _ } = cable;
        script += &format!("MAC_{number}={mac} ADDRESS_{number}={machine}/{PREFIX} PORTAL_{number}={host}:{PORT}\n");
    }
    script += include_str!("../../workbench/multipath");
    let mut disk = script.into_bytes();
    disk.resize(disk.len().next_multiple_of(4096), b'\n');
    disk
}

fn ipxe_script() -> String {
    let Cable { mac: _, host, machine, tap: _ } = CABLES[0];
    let netmask = Ipv4Net::new_assert(machine, PREFIX).netmask();
    format!(
        "#!ipxe\nset net1/ip {machine}\nset net1/netmask {netmask}\nifopen net1\n\
         set initiator-iqn {INITIATOR}\nset username {CHAP_USER}\nset password {CHAP_SECRET}\n\
         sanboot iscsi:{host}::::{TARGET}\n"
    )
}

/// A disk with an EFI system partition that firmware boots from.
async fn efi_disk(disk: &Path, bytes: u64, files: &[(&Path, &str)]) -> Result<()> {
    let doing = format!("making {}", disk.display());
    new_file(disk, bytes)?;
    crate::image::partition(disk, "U").await?;
    let mut mkfs = command("/sbin/mkfs.vfat");
    let first = crate::image::PARTITION_OFFSET;
    mkfs.args(["--offset", &(first / 512).to_string()]).arg(disk).arg(((bytes - first - (1 << 20)) / 1024).to_string());
    run(mkfs, &doing, TOOL_LIMIT).await?;
    let inside = format!("{}@@{first}", disk.display());
    let mut mmd = command("mmd");
    mmd.args(["-i", &inside, "::/EFI", "::/EFI/BOOT"]);
    run(mmd, &doing, TOOL_LIMIT).await?;
    for (source, name) in files {
        let mut mcopy = command("mcopy");
        mcopy.args(["-i", &inside]).arg(source).arg(format!("::/{name}"));
        run(mcopy, &doing, TOOL_LIMIT).await?;
    }
    Ok(())
}

fn new_file(path: &Path, bytes: u64) -> Result<()> {
    let file = fs::File::create(path).map_err(LabError::io(format!("creating {}", path.display())))?;
    file.set_len(bytes).map_err(LabError::io(format!("sizing {}", path.display())))
}

/// Takes kernel and initrd out of a system's file system.
async fn kernel_of(system: &Path, folder: &Path) -> Result<(PathBuf, PathBuf)> {
    let doing = format!("taking the kernel out of {}", system.display());
    let debugfs = async |request: &str| {
        let mut debugfs = command("/sbin/debugfs");
        debugfs.args(["-R", request]).arg(format!("{}?offset={}", system.display(), crate::image::PARTITION_OFFSET));
        run(debugfs, &doing, TOOL_LIMIT).await
    };
    let listing = debugfs("ls -p /boot").await?;
    let take = async |prefix: &str| {
        let name = listing.split('/').find(|word| word.starts_with(prefix));
        let name = name.ok_or_else(|| LabError::unexpected(&*doing, format!("no /boot/{prefix}* in it")))?;
        let file = folder.join(prefix.trim_end_matches('-'));
        debugfs(&format!("dump /boot/{name} {}", file.display())).await.map(|_| file)
    };
    Ok((take("vmlinuz-").await?, take("initrd.img-").await?))
}

/// The tenant's initrd looks for a target before it mounts the root. Here the root is a disk, and the script looks for the
/// target: an archive behind the initrd's own puts an empty file where that is configured.
async fn leave_iscsi_to_the_script(initrd: &Path, folder: &Path) -> Result<()> {
    let doing = format!("adding a file to {}", initrd.display());
    let etc = folder.join("etc");
    fs::create_dir_all(&etc)
        .and_then(|()| fs::write(etc.join("iscsi.initramfs"), ""))
        .map_err(LabError::io(&*doing))?;
    let archive = folder.join("more.cpio");
    let mut cpio = command("cpio");
    cpio.args(["--create", "--quiet", "--format=newc", "-O"]).arg(&archive).current_dir(folder);
    cpio.stdin(Stdio::piped());
    let mut child = cpio.spawn().map_err(LabError::io(&*doing))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(b"etc\netc/iscsi.initramfs\n").await.map_err(LabError::io(&*doing))?;
    }
    let status = child.wait().await.map_err(LabError::io(&*doing))?;
    if !status.success() {
        return Err(LabError::unexpected(doing, format!("cpio failed ({status})")));
    }
    let mut octets = fs::read(initrd).map_err(LabError::io(&*doing))?;
    octets.resize(octets.len().next_multiple_of(4), 0);
    octets.extend(fs::read(&archive).map_err(LabError::io(&*doing))?);
    fs::write(initrd, octets).map_err(LabError::io(doing))
}

const CABLES: [Cable; 2] = [
    Cable {
        tap: "path1",
        mac: "52:54:00:a5:5a:21",
        host: Ipv4Addr::new(10, 30, 1, 1),
        machine: Ipv4Addr::new(10, 30, 1, 2),
    },
    Cable {
        tap: "path2",
        mac: "52:54:00:a5:5a:22",
        host: Ipv4Addr::new(10, 30, 2, 1),
        machine: Ipv4Addr::new(10, 30, 2, 2),
    },
];
/// Of each cable's network.
const PREFIX: u8 = 24;
const PORT: u16 = 3260;
const TARGET: &str = "iqn.2026-01.dev.assay:lab.disk";
const INITIATOR: &str = "iqn.2026-01.dev.assay:lab.machine";
const CHAP_USER: &str = "machine";
/// Of no value outside this lab.
const CHAP_SECRET: &str = "lab-chap-secret-1";
const IPXE: &str = "/usr/lib/ipxe/ipxe.efi";
const TOOL_LIMIT: Duration = Duration::from_secs(60);
const START_LIMIT: Duration = Duration::from_secs(15);
/// For each thing that an emulated machine on a busy host is waited for.
const MACHINE_LIMIT: Duration = Duration::from_secs(240);
